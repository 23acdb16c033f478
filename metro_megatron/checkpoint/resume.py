"""From which checkpoint a run goes on, and what must be equal for it to be a continuation, or a branch, of another."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from metro_megatron.checkpoint.files import AVERAGE, METADATA, iteration_folder, tracked_step
from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.file import load_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import BRANCH_MAY_CHANGE, MAY_CHANGE, Config
from metro_megatron.errors import UserError


def beginning(config: Config) -> Path | None:
    """The checkpoint that a run goes on from: the newest of its own folder, else the one that it branches from.

    None: it begins from nothing. Raises UserError if there is no such checkpoint, or as refuse_other_run.
    """
    run, branch = Path(config.train.output), Path(config.train.branch_from)
    step = tracked_step(run)
    if step is None and not config.train.branch_from:
        return None
    iteration = branch if step is None else iteration_folder(run, step)
    if step is None and not (branch / METADATA).is_file():
        # Not the run's newest: that would be another one when the same command is given again.
        newest = tracked_step(branch)
        such = "iter_0005000 of a run folder" if newest is None else iteration_folder(branch, newest)
        raise UserError(f"train.branch_from {branch} is no checkpoint (no {METADATA}); give one, such as {such}")
    refuse_other_run(iteration, config)
    return iteration


def is_branch_point(iteration: Path, config: Config) -> bool:
    """Whether a checkpoint is not the run's own."""
    return config.train.branch_from != "" and iteration == Path(config.train.branch_from)


def config_differences(saved: Config, given: Config, is_branch: bool = False) -> list[str]:
    """One line per field whose change would make another run of it, or something else than a branch."""
    there, here = flatten(saved), flatten(given)
    may_change = {MAY_CHANGE, BRANCH_MAY_CHANGE} if is_branch else {MAY_CHANGE}
    return [
        f"{option.name} is {here[option.name]!r}, but the checkpoint was made with {there[option.name]!r}"
        for option in options_of(Config)
        if may_change.isdisjoint(option.marks) and here[option.name] != there[option.name]
    ]


def refuse_other_run(iteration: Path, config: Config) -> None:
    """Raise UserError if a checkpoint folder cannot be continued at all, or naming all differences if `config` neither
    continues its run nor branches from it."""
    if (iteration / AVERAGE).is_file():
        raise UserError(
            f"{iteration}: an average of checkpoints has weights, but neither moments nor a place in the data, so no "
            "run continues from it; continue from one of those it was made of, begin a new run with its weights "
            "(train.initialize_from), or turn it into a model with tools/convert_checkpoint.py"
        )
    saved, is_branch = load_config(iteration / "run_config.yaml"), is_branch_point(iteration, config)
    found = config_differences(saved, config, is_branch)
    if is_branch:
        found += _past_differences(iteration, saved, config)
    if found:
        remedy = "or choose another train.branch_from" if is_branch else "or choose another train.output"
        raise UserError([*found, f"{iteration}: give the values of this checkpoint, {remedy}"])


def _past_differences(iteration: Path, saved: Config, given: Config) -> Iterator[str]:
    """What of a branch's plan has not room behind the branching, or is not what was done before it."""
    step = json.loads((iteration / "progress.json").read_text(encoding="utf-8"))["step"]
    if given.train.train_steps <= step:
        yield f"train.train_steps is {given.train.train_steps}, but the branch begins after step {step}; give more"
    begun, planned = (_phases_before(step, one) for one in (saved, given))
    if begun != planned:
        yield (
            f"train.phases has {_listed(planned)} before the branching after step {step}, but the checkpoint was made "
            f"with {_listed(begun)}; keep those, their starts in steps"
        )


def _phases_before(step: int, config: Config) -> list[Phase]:
    """Those that began in the steps done, with their starts in steps."""
    phases = zip(config.train.phases, config.phase_starts[1:], strict=True)
    return [replace(phase, start=start) for phase, start in phases if start < step]


def _listed(phases: list[Phase]) -> str:
    return ", ".join(map(str, phases)) or "no phase"
