"""Draw the curves of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.errors import UserError

if TYPE_CHECKING:
    from metro_megatron.train.curves import Run


@dataclass(frozen=True)
class Options:
    """What to draw."""

    run: list[str]
    """Run folders (train.output of pretrain_metro.py), which may still be training."""
    output: str
    """Picture to write: .png, .svg or .pdf; or .csv: the curves of one healthy run, for --reference."""
    reference: list[str] = field(default_factory=list)
    """Healthy runs to draw beneath, dashed, over tokens instead of steps: a .csv, or the name of one that comes with
    the program (metro, electra, mlm_15, ...). Those that differ in their seeds only become a band, least to largest."""
    commit: str = ""
    """Commit of the program that trained the run, for the head of a .csv."""


def main(options: Options) -> None:
    """Draw losses, replace rate and accuracies over the steps of one or several runs.

    A reference shows whether a run of like size learns when a healthy one did: replace accuracy, AUC and losses leave
    their plateaus at about equal tokens. Figures of other sizes, vocabularies and texts lie elsewhere.
    """
    from metro_megatron.train.curves import Run, draw, shown_figures
    from metro_megatron.train.reference import bands, lacking

    runs, problems = [], []
    folders = [Path(folder) for folder in options.run]
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        try:
            runs.append(replace(Run.read(folder), name=name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if Path(options.output).suffix == ".csv":
        _write_reference(options, runs)
        return
    if options.commit:
        raise UserError(f"--commit {options.commit}: is for the head of a .csv; leave it out, or name an --output .csv")
    references = bands(options.reference)
    draw(runs, Path(options.output), references)
    for line in lacking(shown_figures(runs), references):
        print(line)
    steps = ", ".join(f"{one.name} to step {int(one.training[-1]['step']):,}" for one in runs)
    print(f"made {options.output}: {steps}")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths, as short as tells one from another, and from what lies in pretraining/ of other runs."""
    least = 2 if any(folder.name == "pretraining" for folder in folders) else 1
    most = max(len(folder.parts) for folder in folders)
    names = (["/".join(folder.parts[-parts:]) for folder in folders] for parts in range(least, most + 1))
    return next((found for found in names if len(set(found)) == len(folders)), [str(folder) for folder in folders])


def _write_reference(options: Options, runs: list[Run]) -> None:
    from metro_megatron.train.reference import Reference

    output = Path(options.output)
    if len(runs) != 1 or options.reference:
        raise UserError(f"--output {output}: a .csv holds the curves of one run; give one --run and no --reference")
    Reference.of(runs[0], output.stem, options.commit).write(output)
    print(
        f"made {output} from {options.run[0]}\n"
        f"next: {tool_command('plot_run')} --run RUN --output RUN.png --reference {output}"
    )


run = partial(run_tool, main)
"""The console script."""
