"""What the encoder knows of sentiment without being trained for it: its features, frozen, and a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.kinds import Classification, Row
from tools.demo.baseline import chance, tfidf_accuracy, write_result

if TYPE_CHECKING:
    from metro_megatron.hf.modeling_metro import MetroModel
    from metro_megatron.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Which encoder, what from, and where to."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    train_file: str
    """Labelled texts to learn from."""
    test_file: str
    """Labelled texts to be scored on."""
    output: str
    """JSON file to write."""
    labels: Annotated[int, at_least(2)] = 1000
    """Labelled texts that each classifier learns from."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each draws its labelled texts, and random weights to compare with."""


def main(options: Options) -> None:
    """Classify sentences by frozen features of the pretrained encoder and of random ones, and write the accuracies."""
    from metro_megatron.commands.probe import load_encoder
    from metro_megatron.tokenizer.tokenizer import Tokenizer

    train, test = (read_labelled_texts(Path(path)) for path in (options.train_file, options.test_file))
    folder, output = Path(options.model), Path(options.output)
    tokenizer = Tokenizer.from_folder(folder)
    draws = [_draw(len(train), options.labels, seed) for seed in options.seeds]
    parts = [_part(train, draw) for draw in draws]
    pretrained, random = load_encoder(folder, from_scratch=False, seed=0), []
    for seed, part in zip(options.seeds, parts, strict=True):
        random.append(accuracy(load_encoder(folder, from_scratch=True, seed=seed), tokenizer, part, test))
    result = {
        "pretrained": [accuracy(pretrained, tokenizer, part, test) for part in parts],
        "random_init": random,
        "tfidf": median(tfidf_accuracy(part, test) for part in parts),
        "chance": chance(test),
        "num_train": len(parts[0]),
        "num_test": len(test),
    }
    write_result(output, result)
    print(f"{output}: {result['pretrained']} by pretrained features, {result['random_init']} by random ones")


def accuracy(model: MetroModel, tokenizer: Tokenizer, train: LabelledTexts, test: LabelledTexts) -> float:
    """Of the linear classifier that tools/probe.py has."""
    from metro_megatron.evaluate.frozen import probe

    scores, _ = probe(model, tokenizer, ProbeTask("sentiment", Classification(), _rows(train), _rows(test), {}))
    return scores.figures["accuracy"]


def _rows(texts: LabelledTexts) -> list[Row]:
    return [{"text": text, "label": label} for text, label in zip(texts.first, texts.labels, strict=True)]


def _draw(count: int, wanted: int, seed: int) -> Sequence[int]:
    return np.random.default_rng(seed).permutation(count)[:wanted].tolist()


def _part(texts: LabelledTexts, indices: Sequence[int]) -> LabelledTexts:
    return LabelledTexts([texts.first[i] for i in indices], None, [texts.labels[i] for i in indices])


if __name__ == "__main__":
    run_tool(main)
