"""Draw the curves of one or several runs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError


@dataclass(frozen=True)
class Options:
    """What to draw."""

    run: list[str]
    """Run folders (train.output of pretrain_metro.py), which may still be training."""
    output: str
    """Picture to write: .png, .svg or .pdf."""


def main(options: Options) -> None:
    """Draw losses, replace rate and accuracies over the steps of one or several runs."""
    from metro_megatron.train.curves import Run, draw

    runs, problems = [], []
    for folder in options.run:
        try:
            runs.append(Run.read(Path(folder)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    draw(runs, Path(options.output))
    steps = ", ".join(f"{one.name} to step {int(one.training[-1]['step']):,}" for one in runs)
    print(f"made {options.output}: {steps}")


run = partial(run_tool, main)
"""The console script."""
