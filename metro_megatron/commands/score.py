"""Rank candidates in their prompts by a model's pretrained heads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import CountLines
from metro_megatron.errors import UserError
from metro_megatron.evaluate.prompts import Prompt, read_demonstrations, read_prompts
from metro_megatron.files import replace_text

if TYPE_CHECKING:
    from metro_megatron.evaluate.ranking import HeadName


@dataclass(frozen=True)
class Options:
    """Which model, and on what."""

    model: str
    """Folder written by tools/convert_checkpoint.py, or of a masked language model or ELECTRA of transformers."""
    input: str
    """JSON Lines file, an item a line: "candidates", two strings or more; "text" and "template" of which the prompt is
    made, with {text} and {candidate}; "label", the right candidate or its number, for accuracy."""
    output: str
    """JSON Lines file to write: every item's scores and choice by each head."""
    shots: str = ""
    """JSON Lines file of items with labels that are put before each item as demonstrations, in their order."""
    heads: list[Literal["clm", "rtd", "mlm"]] = field(default_factory=list)
    """clm: main's corrective head; rtd: its detection head; mlm: the auxiliary, or a masked language model. All that
    the model has, if none is given."""
    average: bool = False
    """Compare means over the tokens of a candidate instead of sums, which favor short candidates."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Rows per pass; mlm needs a row for every token of a candidate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


def main(options: Options) -> None:
    """Rank candidate sentences, or words for labels, by how likely a pretrained model finds them: no training.

    The score of a candidate is the sum of log-probabilities of its tokens: by clm and rtd in the text as it stands, by
    mlm each behind <mask>. Items alone are zero shots; with --shots, demonstrations stand before each.
    """
    # Late, so that --help and mistakes do not wait for torch.
    import torch
    from transformers.utils import logging

    from metro_megatron.evaluate.ranking import open_scorer

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU; use auto or cpu")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    demonstrations = read_demonstrations(Path(options.shots)) if options.shots else []
    prompts = read_prompts(Path(options.input), demonstrations)
    scorer = open_scorer(Path(options.model), options.heads)
    if problems := scorer.problems(prompts):
        raise UserError([f"{options.input}, {problem}" for problem in problems])
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    scores: dict[HeadName, list[list[float]]] = {}
    for head in scorer.heads:
        head.model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the types
        lines = CountLines(f"{head.name}: {{:,}} rows read")
        scores[head.name] = scorer.scores(head, prompts, options.batch_size, options.average, lines.show)
        head.model.to("cpu")  # type: ignore[arg-type]
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in results(prompts, scores)))
    print(describe(prompts, scores, len(demonstrations)))
    print(f"made {options.output}\nnext: {tool_command('finetune')} --model {options.model}, to train on labels")


def results(prompts: Sequence[Prompt], scores: Mapping[HeadName, Sequence[Sequence[float]]]) -> list[dict[str, object]]:
    """A line of the output for every item."""
    return [
        {
            "line": prompt.line,
            "candidates": prompt.candidates,
            **({} if prompt.label is None else {"label": prompt.candidates[prompt.label]}),
            "choice": {head: prompt.candidates[best(of_items[item])] for head, of_items in scores.items()},
            "scores": {head: of_items[item] for head, of_items in scores.items()},
        }
        for item, prompt in enumerate(prompts)
    ]


def best(scores: Sequence[float]) -> int:
    """Number of the largest; of equal ones the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def describe(prompts: Sequence[Prompt], scores: Mapping[HeadName, Sequence[Sequence[float]]], num_shots: int) -> str:
    """Accuracy by head, where there are labels, beside that of guessing and of always giving the commonest label."""
    known = [(item, prompt) for item, prompt in enumerate(prompts) if prompt.label is not None]
    lines = [f"{len(prompts):,} items, {len(known):,} with a label, {num_shots} shots"]
    if known:
        floor = f"chance {fmean(1 / len(prompt.candidates) for _, prompt in known):.4f}"
        if len({prompt.candidates for _, prompt in known}) == 1:
            label, count = Counter(prompt.candidates[prompt.label or 0] for _, prompt in known).most_common(1)[0]
            floor += f", always {label!r} {count / len(known):.4f}"
        for head, of_items in scores.items():
            right = fmean(best(of_items[item]) == prompt.label for item, prompt in known)
            lines.append(f"  {head}: accuracy {right:.4f} ({floor})")
    return "\n".join(lines)


run = partial(run_tool, main)
"""The console script."""
