"""Which of four words stood in a gap, by the detection head as it was pretrained: no training, no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.commands.score import best
from metro_megatron.errors import UserError
from metro_megatron.evaluate.prompts import Prompt, read_prompts
from tools.demo.baseline import tfidf_and_regression, write_result

if TYPE_CHECKING:
    from metro_megatron.evaluate.ranking import Scorer

BATCH_SIZE = 64


@dataclass(frozen=True)
class Options:
    """Which pair, what from, and where to."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    train_file: str
    """Gapped sentences, as tools/score.py reads them, for TF-IDF to learn from."""
    test_file: str
    """Gapped sentences to be scored on, an equal part of them for each seed."""
    output: str
    """JSON file to write."""
    seeds: Annotated[int, at_least(1)] = 3
    """Parts of the test, each asked of the pretrained heads and of random weights of its own."""


def main(options: Options) -> None:
    """Choose words for gaps by the pretrained detection head and by random ones, and write the accuracies."""
    from transformers import set_seed
    from transformers.utils import logging

    from metro_megatron.evaluate.ranking import Head, open_scorer

    logging.disable_progress_bar()
    train, test = (read_prompts(Path(path)) for path in (options.train_file, options.test_file))
    if len(test) < options.seeds:
        raise UserError(f"{options.test_file}: {len(test)} gapped sentences, must be one for each of {options.seeds}")
    parts = [test[seed :: options.seeds] for seed in range(options.seeds)]
    scorer, output = open_scorer(Path(options.model), ["rtd"]), Path(options.output)
    pretrained, random = [accuracy(scorer, part) for part in parts], []
    for seed, part in enumerate(parts):
        set_seed(seed)
        drawn = Head("rtd", type(scorer.heads[0].model)(scorer.heads[0].model.config))
        random.append(accuracy(replace(scorer, heads=[drawn]), part))
    result = {
        "pretrained": pretrained,
        "random_init": random,
        "tfidf": median(tfidf_accuracy(train, part) for part in parts),
        "chance": fmean(1 / len(prompt.candidates) for prompt in test),
        "num_train": len(train),
        "num_test": len(test),
    }
    write_result(output, result)
    print(f"{output}: {pretrained} by the pretrained head, {random} by random ones")


def accuracy(scorer: Scorer, prompts: Sequence[Prompt]) -> float:
    """How often the right word is found the most original one."""
    scores = scorer.scores(scorer.heads[0], prompts, BATCH_SIZE, average=True)
    return _accuracy(prompts, scores)


def tfidf_accuracy(train: Sequence[Prompt], test: Sequence[Prompt]) -> float:
    """The same of a classifier of right and wrong sentences by their words and word pairs."""
    model = tfidf_and_regression()
    rightness = [number == prompt.label for prompt in train for number in range(len(prompt.candidates))]
    model.fit(_filled(train), rightness)
    scores = iter(model.decision_function(_filled(test)).tolist())
    return _accuracy(test, [[next(scores) for _ in prompt.candidates] for prompt in test])


def _filled(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.filled(number).text for prompt in prompts for number in range(len(prompt.candidates))]


def _accuracy(prompts: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> float:
    return fmean(float(best(of_prompt) == prompt.label) for of_prompt, prompt in zip(scores, prompts, strict=True))


if __name__ == "__main__":
    run_tool(main)
