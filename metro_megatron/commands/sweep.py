"""Fine-tune over grids, seeds and tasks, and make tables and pictures of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least, suggestion
from metro_megatron.errors import UserError
from metro_megatron.files import locked, replace_text
from metro_megatron.finetune.tasks import TOGETHER, TogetherName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from metro_megatron.commands import finetune
    from metro_megatron.finetune.models import Head
    from metro_megatron.finetune.recipe import Recipe
    from metro_megatron.finetune.sweep.outcome import Outcome
    from metro_megatron.finetune.sweep.plan import Plan
    from metro_megatron.finetune.sweep.points import Point


@dataclass(frozen=True)
class Options:
    """Of the sweep; all others are those of tools/finetune.py, with one value or several."""

    output: str
    """Folder of the sweep: runs/, table.md, points.csv, runs.csv, boxes.png, flops.png, leaderboard/."""
    workers: Annotated[int, at_least(1)] = 1
    """Runs at a time, each a process: they share the GPUs in turn and the cores evenly."""
    rows: list[str] = field(default_factory=lambda: ["model", "from_scratch"])
    """Options whose values make rows of the table. Of all others but task and seed, the values with the best median
    over seeds are picked, for each row and task."""
    keep_models: bool = False
    """Keep every fine-tuned model, runs/NAME/model; without it, figures and predictions are all that stays."""


def main(options: Options, tokens: list[str]) -> None:
    """Fine-tune over grids, seeds and tasks: any option of tools/finetune.py may be given several values.

    All combinations are run, each as tools/finetune.py would be, in a process with a log of its own. METRO Table 11 at
    base size is --learning_rate 1e-5 3e-5 5e-5 --batch_size 16 32 --warmup_steps 50 100 500 --epochs 10 --seed 1 2 3 4
    5. Runs that are finished are known by a hash of their options, the contents of model and data, and the releases of
    the packages: the same command again does what is left. Failed runs (ended early, a loss that is no number, one
    answer for every text) are named, and stand below all others in the medians.
    """
    from metro_megatron.commands import finetune
    from metro_megatron.finetune.sweep.plan import hashed, read_plan

    plan = read_plan(tokens, finetune.Options)
    known = plan.runs[0].values
    problems = [
        f"--rows {name}: no option of tools/finetune.py{suggestion(name, known)}"
        for name in options.rows
        if name not in known
    ]
    if problems:
        raise UserError(problems)
    # Before the hours of training, whatever is not there.
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401

    refuse_mistakes(plan)
    plan, output = hashed(plan), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        with locked(output / "lock", wait=False):
            outcomes: dict[str, Outcome] = {}
            try:
                run_all(plan, options, output, outcomes)
            except UserError:
                if outcomes:
                    write_results(plan, outcomes, options.rows, output)
                raise
            write_results(plan, outcomes, options.rows, output)
    except BlockingIOError as error:
        raise UserError(f"{output}: another process runs this sweep; wait for it or end it") from error
    print(
        f"made {output}: table.md, points.csv, runs.csv and pictures\nnext: more values or seeds, by the same command"
    )


def refuse_mistakes(plan: Plan) -> None:
    """Open every model and read every task's examples once. Raises UserError with all that runs would refuse."""
    from metro_megatron.commands import finetune
    from metro_megatron.finetune.sweep.plan import options_of_run

    asked: dict[str, list[tuple[Head, dict[str, Any]]]] = {}
    problems: dict[str, None] = {}

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            problems.update(dict.fromkeys(error.problems))

    checks: dict[str, Callable[[], None]] = {}
    for run in plan.runs:
        options = options_of_run(run, finetune.Options)
        recipe, examples = options.recipe, repr((options.task, options.source))
        if examples not in asked:
            asked[examples] = []
            with noted():
                asked[examples] = _asked(options)
        checks[repr(recipe)] = partial(_check_recipe, recipe)
        checks[repr((options.model, recipe.tokenizer, recipe.max_length))] = partial(_check_model, options)
        plain = replace(recipe, seed=0, learning_rate=0.0)
        checks[repr((options.model, examples, plain))] = partial(_check_fit, options, asked[examples])
    for check in checks.values():
        with noted():
            check()
    if problems:
        raise UserError(list(problems))


def _check_recipe(recipe: Recipe) -> None:
    problems = recipe.problems()
    if problems:
        raise UserError(problems)


def _check_model(options: finetune.Options) -> None:
    from metro_megatron.finetune.models import read_config, read_tokenizer

    folder, recipe = Path(options.model), options.recipe
    config = read_config(folder, {})
    read_tokenizer(Path(recipe.tokenizer) if recipe.tokenizer else folder, config, recipe.max_length)


def _asked(options: finetune.Options) -> list[tuple[Head, dict[str, Any]]]:
    """Head and settings of every task that a run learns: its examples need not stay."""
    if options.task in TOGETHER:
        tasks = list(options.source.read_together(cast(TogetherName, options.task)).values())
    else:
        tasks = [options.source.read(options.task)]
    for task in tasks:
        for other in task.others.values():
            other.settings()
    return [(task.head, task.settings()) for task in tasks]


def _check_fit(options: finetune.Options, asked: Sequence[tuple[Head, dict[str, Any]]]) -> None:
    """Of a recipe with what is learned, and with the model."""
    from metro_megatron.finetune.models import model_class, read_config
    from metro_megatron.finetune.multitask import problems_together
    from metro_megatron.finetune.packing import refuse_packing
    from metro_megatron.finetune.trainer import refuse_class_weights

    folder, recipe = Path(options.model), options.recipe
    if options.task in TOGETHER and (problems := problems_together(recipe)):
        raise UserError(problems)
    for head, settings in asked:
        config = read_config(folder, settings)
        model_class(head, folder, config)
        refuse_packing(recipe, config)
        refuse_class_weights(recipe, head, config)


def run_all(plan: Plan, options: Options, output: Path, outcomes: dict[str, Outcome]) -> None:
    """Do what is left, put what each run came to into `outcomes` by its name, and say how far it is."""
    from metro_megatron.finetune.sweep.running import Runner, slots

    environments = slots(options.workers, visible_gpus(), len(os.sched_getaffinity(0)))
    runner = Runner(output / "runs", environments, options.keep_models)
    left = sum(not runner.is_finished(run) for run in plan.runs)
    print(f"{len(plan.runs)} runs, {len(plan.runs) - left} of them finished before", flush=True)
    without = sum(runner.is_finished(run) and not runner.has_model(run) for run in plan.runs)
    if options.keep_models and without:
        print(f"note: {without} of the finished runs have kept no model; remove their folders in {runner.folder} first")
    start, ended, old = time.monotonic(), 0, len(plan.runs) - left

    def say(outcome: Outcome) -> None:
        nonlocal ended
        outcomes[outcome.run.name] = outcome
        ended += 1
        if ended <= old:
            return
        seconds = (time.monotonic() - start) / (ended - old) * (len(plan.runs) - ended)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in outcome.scores.items())
        said = f"FAILED, {outcome.failure}" if outcome.failure else figures
        given = " ".join(f"{name} {outcome.run.values[name]}" for name in plan.varied)
        print(f"[{ended}/{len(plan.runs)}] {given}: {said} | {timedelta(seconds=round(seconds))} left", flush=True)

    runner.outcomes(plan.runs, say)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def write_results(plan: Plan, ended: Mapping[str, Outcome], rows: Sequence[str], output: Path) -> None:
    """Tables and pictures of runs that have ended, which are given by their names."""
    from metro_megatron.finetune.sweep.pictures import box_plots, flops_curves
    from metro_megatron.finetune.sweep.points import points
    from metro_megatron.finetune.sweep.table import markdown, points_csv, runs_csv

    outcomes = [ended[run.name] for run in plan.runs if run.name in ended]
    found = points(outcomes, plan.varied, rows)
    for name, text in {
        "table.md": markdown(found),
        "points.csv": points_csv(found),
        "runs.csv": runs_csv(outcomes),
    }.items():
        replace_text(output / name, text)
    box_plots(found).savefig(output / "boxes.png", dpi=120)
    curves = flops_curves(found, lambda row: _flops(dict(row)))
    (output / "flops.png").unlink(missing_ok=True)
    if curves:
        curves.savefig(output / "flops.png", dpi=120)
    print("\n" + markdown(found))
    for problem in write_leaderboards(found, output):
        print(problem)


def _flops(row: Mapping[str, Any]) -> float | None:
    """Of the pretraining that the runs of a row begin with."""
    from metro_megatron.hf.card import pretraining_flops

    return None if row.get("from_scratch") else pretraining_flops(Path(row.get("model", "")))


def write_leaderboards(found: Sequence[Point], output: Path) -> list[str]:
    """Files for the servers, of every row a folder with those of its best runs; what is missing, a line each."""
    from metro_megatron.finetune.sweep.leaderboard import GLUE, SUPERGLUE, write_submission
    from metro_megatron.finetune.sweep.points import picked
    from metro_megatron.finetune.sweep.table import label

    shutil.rmtree(output / "leaderboard", ignore_errors=True)  # an earlier sweep may have had more rows or tests
    problems = []
    for number, row in enumerate(dict.fromkeys(point.row for point in found), start=1):
        best = {point.task: point.best for point in picked(found) if point.row == row and point.best}
        for server in (GLUE, SUPERGLUE):
            missing = write_submission(server, best, output / "runs", output / "leaderboard" / str(number))
            problems += [f"leaderboard/{number}, {label(row)}: {one}" for one in missing]
    return problems


run = partial(run_tool, main)
"""The console script."""
