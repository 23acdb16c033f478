"""Evaluate an exported model on held-out text: a pair fills, detects, corrects."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.data.shards import open_shards
from metro_megatron.data.token_counts import count_tokens
from metro_megatron.errors import UserError
from metro_megatron.evaluate.scores import Score, write_scores
from metro_megatron.text.documents import read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.text.records import Reject
from metro_megatron.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from metro_megatron.hf.configuration_metro import MetroConfig
    from metro_megatron.hf.modeling_metro import MetroForPreTraining
    from metro_megatron.objective.term import Sums


@dataclass(frozen=True)
class Options:
    """Which pair, on what."""

    model: str
    """Folder written by tools/convert_checkpoint.py."""
    input: list[str]
    """Held-out text: .jsonl (a JSON object with "text" per line) or .txt (blank lines between documents)."""
    output: str
    """JSON file to write."""
    unigram_from: str
    """Prefix of the training shard whose token frequencies are the trivial model."""
    documents: str = ""
    """JSON Lines file to write with the figures of every document; tools/compare_runs.py reads those in RUN/scores."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Samples per batch."""
    sentences: Annotated[int, at_least(0)] = 4
    """How many sentences are printed, and kept in the output."""
    seed: int = 1
    """Seed of masks and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


def main(options: Options) -> None:
    """Evaluate an exported model on text it has not seen, and print a few sentences filled and corrected.

    15% of the tokens are masked; the auxiliary model fills them by sampling; the main model says which tokens are
    not the original ones and what stood there. A model has figures of what it was pretrained for; a main model without
    auxiliary reads random tokens, or <mask> if it is a masked language model. Equal input and seed give equal figures,
    which join the model card of the folder.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import torch
    from transformers.utils import logging

    from metro_megatron.evaluate.intrinsic import document_figures, evaluate, held_out_text
    from metro_megatron.evaluate.sentences import choose_sentences, legend, show
    from metro_megatron.hf.card import CARD, add_evaluation

    model, seed = Path(options.model), options.seed
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; use auto or cpu")
    logging.disable_progress_bar()
    files = find_inputs(options.input)
    pair = load_pair(model)
    counts = token_frequencies(options.unigram_from, model, pair.config.vocab_size)
    rejects: Counter[Reject] = Counter()
    documents = [document.units for document in read_documents(files, rejects)]
    text = held_out_text(documents, Tokenizer.from_folder(options.model))
    use_cuda = options.device != "cpu" and torch.cuda.is_available()
    pair.to("cuda" if use_cuda else "cpu")  # type: ignore[arg-type]  # transformers' decorator hides the types
    of_samples: dict[int, Sums] | None = {} if options.documents else None
    figures = evaluate(pair, text, counts, options.batch_size, seed, _print_progress, of_samples)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    sentences = list(show(pair, model, choose_sentences(documents, options.sentences), counts, seed))
    examples = {"legend": legend(pair.config), "sentences": [asdict(shown) for shown in sentences]}
    result = {**figures, "num_documents": len(documents), "examples": examples}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(describe(pair.config, figures, len(documents), rejects.total()))
    print(legend(pair.config))
    for shown in sentences:
        print(f"{shown}\n")
    held_out = {"held-out text": ", ".join(Path(one).name for one in options.input), "documents": len(documents)}
    is_told = add_evaluation(model, {**held_out, **figures})
    print(f"made {options.output}" + (f"; its figures stand in {model / CARD}, too" if is_told else ""))
    if of_samples is not None:
        write_scores(
            Path(options.documents), _document_scores(documents, document_figures(pair.config, text, of_samples))
        )
        print(f"made {options.documents}; compare runs with {tool_command('compare_runs')}")


def load_pair(folder: Path) -> MetroForPreTraining:
    """The whole pretrained model in fp32. Raises UserError for what is not an export."""
    from metro_megatron.hf.folder import exported_config, whole_model
    from metro_megatron.hf.modeling_metro import MetroForPreTraining

    exported_config(folder)
    model: MetroForPreTraining = whole_model(MetroForPreTraining, folder)
    return model


def token_frequencies(prefix: str, model: Path, vocab_size: int) -> NDArray[np.int64]:
    """Frequencies [V] of a dataset's ids. Raises UserError if its tokenizer is not the model's."""
    shards = open_shards([prefix])
    sha256 = Tokenizer.from_folder(model).sha256
    if shards[0].tokenizer_sha256 != sha256:
        raise UserError(
            f"{prefix} has tokenizer {shards[0].tokenizer_sha256[:12]}, {model} has {sha256[:12]}; "
            "give the shard that the model was trained on"
        )
    return count_tokens(shards, vocab_size)


def _document_scores(documents: Sequence[Sequence[str]], found: Sequence[dict[str, float]]) -> Iterator[Score]:
    """A document is known by its number and its text, so that scores of other texts are never paired."""
    for number, (units, figures) in enumerate(zip(documents, found, strict=True)):
        digest = hashlib.sha256("\n".join(units).encode()).hexdigest()[:12]
        for name, value in figures.items():
            yield Score(f"held_out.{name}", f"{number}-{digest}", value)


def describe(config: MetroConfig, figures: dict[str, float], num_documents: int, num_rejected: int) -> str:
    """The figures of an exported model beside their trivial values."""
    from metro_megatron.evaluate.intrinsic import filling, terms_of
    from metro_megatron.objective.cloze import CHANCE, OneChoiceCloze
    from metro_megatron.objective.vocabulary import LanguageModel

    lines = [
        f"{num_documents:,} documents, {figures['num_tokens']:,} tokens, {figures['num_masked']:,} masked"
        + (f"; {num_rejected:,} records rejected" if num_rejected else "")
    ]
    if filling(config) == "uniform":
        lines.append("  this export has no auxiliary model: masks are filled with random tokens, easier to tell")
    lines += [
        f"  {term.exported.upper()} loss {figures[f'{term.name}_loss']:.3f} "
        f"(unigram {figures['unigram_loss']:.3f}), accuracy {figures[f'{term.name}_accuracy']:.3f} "
        f"(most frequent token {figures['unigram_accuracy']:.3f})"
        for term in terms_of(config)
        if isinstance(term, LanguageModel)
    ]
    if "cloze_loss" in figures:
        lines.append(
            f"  cloze loss {figures['cloze_loss']:.3f} (chance {CHANCE:.3f}), accuracy {figures['cloze_accuracy']:.3f} "
            f"(chance {1 / (1 + OneChoiceCloze.num_distractors):.3f})"
        )
    if "rtd_loss" in figures:
        lines += [
            f"  RTD loss {figures['rtd_loss']:.3f} (trivial {figures['rtd_trivial_loss']:.3f}), "
            f"AUC {figures['rtd_auc']:.3f} (trivial 0.5)",
            f"  replaced {figures['replace_rate']:.3f} of the tokens, found {figures['replace_accuracy']:.3f} of them; "
            f"kept {figures['non_replace_accuracy']:.3f} of the originals",
        ]
    return "\n".join(lines)


def _print_progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"evaluation step {done}/{total}", flush=True)


run = partial(run_tool, main)
"""The console script."""
