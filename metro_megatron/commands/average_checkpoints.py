"""Average the weights of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign


@dataclass(frozen=True)
class Options:
    """Of what, with which weights, to where."""

    load: list[str]
    """Checkpoints: iter_ folders, or run folders, of which the newest is taken. Of one run, or of runs of one
    architecture, tokenizer, objective and kind of corruption; layouts and all else may differ."""
    output: str
    """Folder to write: a checkpoint of weights alone, with tokenizer and average.json."""
    last: Annotated[int, at_least(0)] = 0
    """Take the last so many checkpoints of the one run folder that --load names; 0: those that it lists."""
    weights: list[float] = field(default_factory=list)
    """A positive number for each checkpoint, in the order of --load or from old to new; divided by their sum. None: all
    count the same."""
    part: Literal["pair", "main"] = "pair"
    """pair: auxiliary and main. main: main alone, whose export has no auxiliary."""


def main(options: Options) -> None:
    """Average the weights of checkpoints, written under any layouts, into a checkpoint folder.

    Sums are in fp64, results in fp32. Every file of the models is compared with its hash before anything is averaged,
    and memory holds single tensors only. tools/convert_checkpoint.py makes a model of the folder, for tools/evaluate.py
    and tools/finetune.py. Pretraining cannot go on from it: it has no moments and no place in the data. An earlier
    average at the same place is replaced.
    """
    # Late, so that --help and mistakes do not wait for torch.
    from metro_megatron.checkpoint.average import AVERAGED_FILES, Average, Source, normalized
    from metro_megatron.checkpoint.files import TRACKER

    target = Path(options.output)
    refuse_foreign(target, AVERAGED_FILES)
    if target.name.startswith("iter_") and (target.parent / TRACKER).is_file():
        raise UserError(f"{target}: is among the checkpoints of a run, which would go on from it; give another name")
    folders = _checkpoints(options)
    weights = normalized(options.weights, len(folders))
    sources = []
    for folder, weight in zip(folders, weights, strict=True):
        sources.append(Source.open(folder, weight))
        print(f"{folder}: the model's files are as written, weight {weight:.4g}", flush=True)
    average = Average(sources, options.part)
    with ReadingProgress(f"{target}: averaging", average.num_bytes) as progress:
        average.write(target, progress.advance)
    print(
        f"made {target}, the average of {len(sources)} checkpoints: {len(average.names)} tensors, weights alone\n"
        f"next: {tool_command('convert_checkpoint')} --load {target} --output DIR"
    )


def _checkpoints(options: Options) -> list[Path]:
    from metro_megatron.checkpoint.average import newest
    from metro_megatron.checkpoint.read import find_iteration

    if not options.last:
        return [find_iteration(Path(one)) for one in options.load]
    if len(options.load) != 1:
        raise UserError(f"--last {options.last}: is of one run, --load names {len(options.load)} folders; name one")
    return newest(Path(options.load[0]), options.last)


run = partial(run_tool, main)
"""The console script."""
