"""From which checkpoint a run goes on, and what must be equal for it to be a continuation, or a branch, of another."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from metro_megatron.checkpoint.files import (
    AVERAGE,
    METADATA,
    TRACKER,
    iteration_folder,
    newest_step,
    resumable_steps,
    saved_steps,
    tracked_step,
    verify_texts,
)
from metro_megatron.cli.options import Option, flatten, options_of
from metro_megatron.config.file import load_config
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import BRANCH_MAY_CHANGE, MAY_CHANGE, OVERRIDE_MAY_CHANGE, Config
from metro_megatron.errors import UserError


def beginning(config: Config) -> Path | None:
    """The first of `beginnings` whose configuration can be read; None: the run begins from nothing.

    For a first look: whether it is whole is seen when it is loaded. Raises UserError as `beginnings` does, if no
    configuration can be read, or as refuse_other_run.
    """
    problems = []
    for iteration in beginnings(config):
        try:
            verify_texts(iteration)  # a value that a flipped bit has changed is no other run's
            load_config(iteration / "run_config.yaml")
        except UserError as error:
            problems += error.problems
            continue
        refuse_other_run(iteration, config)
        return iteration
    if problems:
        raise UserError(problems)
    return None


def beginnings(config: Config) -> list[Path]:
    """The checkpoints that a run may go on from, the best first: of its own folder, else the one that it branches from.

    None: it begins from nothing. Raises UserError if the run had checkpoints, of which none is there, and if
    train.branch_from is no checkpoint.
    """
    run, branch = Path(config.train.output), Path(config.train.branch_from)
    steps = resumable_steps(run)
    if not steps and (run / TRACKER).is_file():
        raise UserError(
            f"{run / TRACKER} says that the run was saved, but none of its checkpoints is there: bring one back, or "
            "remove that file to begin the run anew"
        )
    if steps or not config.train.branch_from:
        return [iteration_folder(run, step) for step in steps]
    if not (branch / METADATA).is_file():
        # Not the run's newest: that would be another one when the same command is given again.
        newest = newest_step(branch)
        such = "iter_0005000 of a run folder" if newest is None else iteration_folder(branch, newest)
        raise UserError(f"train.branch_from {branch} is no checkpoint (no {METADATA}); give one, such as {such}")
    return [branch]


def lost_tracker(run: Path) -> list[str]:
    """A line where a run folder's checkpoints are there, but not what says which of them is the newest."""
    steps = saved_steps(run)
    if not steps or tracked_step(run) is not None:
        return []
    return [
        f"{run / TRACKER} is lost or names no checkpoint that is there; the newest one there is of step {steps[-1]}"
    ]


def is_branch_point(iteration: Path, config: Config) -> bool:
    """Whether a checkpoint is not the run's own."""
    return config.train.branch_from != "" and iteration == Path(config.train.branch_from)


def config_differences(saved: Config, given: Config, is_branch: bool = False) -> list[str]:
    """One line per field whose change would make another run of it, or something else than a branch."""
    may_change = {MAY_CHANGE, BRANCH_MAY_CHANGE} if is_branch else {MAY_CHANGE}
    return [
        f"{option.name} is {here!r}, but the checkpoint was made with {there!r}"
        + (" (train.override may name it)" if OVERRIDE_MAY_CHANGE in option.marks else "")
        for option, there, here in _changed(saved, given)
        if may_change.isdisjoint(option.marks) and option.name not in given.train.override
    ]


def overridden(saved: Config, given: Config) -> dict[str, tuple[Any, Any]]:
    """What a resumed run is told anew about its further steps, by name of the option: as it was, and as it is."""
    steering = {"train.skip_steps", *given.train.override}
    return {option.name: (there, here) for option, there, here in _changed(saved, given) if option.name in steering}


def overridden_options(iteration: Path, given: Config) -> list[str]:
    """What train.override must name so that `given` goes on from a checkpoint."""
    saved = load_config(iteration / "run_config.yaml")
    return [option.name for option, _, _ in _changed(saved, given) if OVERRIDE_MAY_CHANGE in option.marks]


def _changed(saved: Config, given: Config) -> Iterator[tuple[Option, Any, Any]]:
    there, here = flatten(saved), flatten(given)
    for option in options_of(Config):
        if here[option.name] != there[option.name]:
            yield option, there[option.name], here[option.name]


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
    else:
        found += _skipped_otherwise(iteration, saved, config)
    if found:
        remedy = "or choose another train.branch_from" if is_branch else "or choose another train.output"
        raise UserError([*found, f"{iteration}: give the values of this checkpoint, {remedy}"])


def _past_differences(iteration: Path, saved: Config, given: Config) -> Iterator[str]:
    """What of a branch's plan has not room behind the branching, or is not what was done before it."""
    step = _steps_done(iteration)
    if given.train.train_steps <= step:
        yield f"train.train_steps is {given.train.train_steps}, but the branch begins after step {step}; give more"
    yield from _other_phases(step, saved, given)
    yield from _other_skips(step, saved, given)


def rate_jumps(iteration: Path, given: Config) -> list[str]:
    """A line for each learning rate that is, at a branch's first step, more than a tenth off its parent's plan."""
    saved, step = load_config(iteration / "run_config.yaml"), _steps_done(iteration)
    has_own = any(one.optimizer.auxiliary_schedule for one in (saved, given))
    found = []
    for of, there, here in zip(("", " of the auxiliary"), _rates(saved, step), _rates(given, step), strict=True):
        if (of and not has_own) or abs(here - there) <= 0.1 * there:
            continue
        found.append(
            f"warning: the learning rate{of} is {here:.3g} in step {step + 1:,}, the first of the branch, and would be "
            f"{there:.3g} in the run that it branches from; a decay from the peak begins here with "
            f"optimizer.lr_decay_steps {given.train.train_steps - step}, one from a lower rate takes an lr_factor of "
            "train.phases, or optimizer.auxiliary_lr_schedule"
        )
    return found


def _rates(config: Config, step: int) -> tuple[float, float]:
    """Of main and of what the auxiliary alone has, in a step counted from 0."""
    optimizer, steps = config.optimizer, config.train.train_steps
    factor, own = config.lr_factor.at(step, steps), optimizer.auxiliary_schedule
    rate = optimizer.learning_rate(steps).at(step, steps)
    of_auxiliary = own.at(step, steps) if own else rate / optimizer.lr
    return factor * rate, factor * of_auxiliary * optimizer.auxiliary.lr


def _steps_done(iteration: Path) -> int:
    return int(json.loads((iteration / "progress.json").read_text(encoding="utf-8"))["step"])


def _other_phases(step: int, saved: Config, given: Config) -> Iterator[str]:
    begun, planned = (_phases_before(step, one) for one in (saved, given))
    if begun != planned:
        yield (
            f"train.phases has {_listed(planned)} before the checkpoint after step {step}, but that was made with "
            f"{_listed(begun)}; keep those, their starts in steps"
        )


def _skipped_otherwise(iteration: Path, saved: Config, given: Config) -> Iterator[str]:
    """What of the plan of steps that are passed over is not what was done before the checkpoint."""
    step = _steps_done(iteration)
    if given.train.train_steps < step:
        yield f"train.train_steps is {given.train.train_steps}, but {step} are done; give more"
    yield from _other_phases(step, saved, given)
    yield from _other_skips(step, saved, given)


def _other_skips(step: int, saved: Config, given: Config) -> Iterator[str]:
    before, planned = (
        {one for part in config.skipped_steps for one in part if one < step} for config in (saved, given)
    )
    if before != planned:
        yield (
            f"train.skip_steps is {given.train.skip_steps}, but up to step {step} the checkpoint was made with "
            f"{saved.train.skip_steps}; keep those, and add later ones only"
        )


def _phases_before(step: int, config: Config) -> list[Phase]:
    """Those that began in the steps done, with their starts in steps."""
    phases = zip(config.train.phases, config.phase_starts[1:], strict=True)
    return [replace(phase, start=start) for phase, start in phases if start < step]


def _listed(phases: list[Phase]) -> str:
    return ", ".join(map(str, phases)) or "no phase"
