"""Time whole optimizer steps of a configuration on one device, or on the processes of torchrun.

Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...).
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.isolation import Worker, WorkerFailed
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.training import (
    CHOICES,
    FUSED,
    TIME_UP,
    Plan,
    StepBench,
    StepRow,
    add_gains,
    bench_config,
    prepare_data,
)
from fused.dispatch import describe
from metro_megatron.cli.command_line import is_first_process, run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config, preset_names
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.plan.memory import state_bytes
from metro_megatron.train.launch import choose_device

OUTPUT = "docs/benchmarks/train"
START_LIMIT_S, ROW_GRACE_S = 180.0, 60.0
"""How long a process may take to start; and a row beyond its time, which is for steps: it builds the model too."""
TARGETS = {"base": 50.0, "xxl": 60.0}
"""Percent of the matrix rate on real tokens, packed, all operators fused, on one H100 or H200.

Counted: 29 at base with today's kernels, 44 with all that docs/benchmarks.md lists rewritten."""
FIGURES = (
    *("seconds_per_step", "tokens_per_s", "slot_tokens_per_s", "pad_percent", "tflops", "mfu_percent", "peak_gb"),
    *("data_percent", "speed_gain_percent", "memory_gain_percent"),
)
COLUMNS = (
    *("preset", "layout", "fused", "status", *FIGURES, "gflop_per_token", "steps", "processes", "micro_batches"),
    *("micro_batch_tokens", "precision", "recompute", "changes"),
)


@dataclass(frozen=True)
class Options:
    """What is timed, how often, how long."""

    layouts: list[Literal["packed", "padded"]] = field(default_factory=lambda: ["packed", "padded"])
    """How samples become rows."""
    micro_batches: Annotated[int, at_least(1)] = 8
    """Of a step and data-parallel rank."""
    warm_up: Annotated[int, at_least(1)] = 3
    """Steps before those that are timed."""
    steps: Annotated[int, at_least(1)] = 10
    """Timed steps."""
    budget_s: float = 480.0
    """Seconds for everything; what is left is not run."""
    table5: bool = False
    """torch's own operators, with each of ours alone, with all: the paper's Table 5."""
    profile: str = ""
    """Trace of 2 steps of the first layout: .json or .json.gz."""
    output: str = ""
    """Results without ending; by default docs/benchmarks/train, on the CPU none."""
    preset: str = ""
    """Name in the results; by default that of the last --config."""
    commit: str = ""
    """Commit to note where the copy has no git."""


def main(options: Options, others: list[str]) -> int:
    """Time whole optimizer steps of a configuration on one device, or on the processes of torchrun.

    Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...). Exit
    codes: 0 every row ran, or the time was up, 1 a row failed, 2 nothing could be measured, with the reason.
    """
    config = parse_config(others)
    options = replace(options, preset=options.preset or _preset(others, config))
    device, world = choose_device(config), int(os.environ.get("WORLD_SIZE", 1))
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    config, changes = bench_config(config, options.micro_batches, world, memory)
    plan = Plan(options.micro_batches, options.warm_up, options.steps, world)
    deadline = time.monotonic() + options.budget_s
    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder:
        config = prepare_data(config, plan, Path(folder))
        if found := problems(config, world, device):
            raise UserError(found)
        head = {
            **provenance(
                torch.device(device), ["python", "-m", "benchmarks.bench_train", *sys.argv[1:]], options.commit
            ),
            "operators": describe(torch.device(device)),
        }
        return _run(options, config, plan, device, changes, head, deadline)


def _run(
    options: Options, config: Config, plan: Plan, device: str, changes: list[str], head: Row, deadline: float
) -> int:
    is_alone, is_first = plan.processes == 1, is_first_process()
    ask: Ask
    if is_alone:
        worker = Worker(_start, config, plan, device, changes)
        ask, end = _ask_worker(worker), worker.close
    else:
        session = StepBench(config, plan, device, changes)
        ask, end = (lambda task, seconds: session.answer(task)), session.leave
    try:
        ceilings = ask(None, START_LIMIT_S)
        head |= {"matrix_tflops": ceilings.matrix_tflops, "state_gb": state_bytes(config) / 1e9}
        output = options.output or ("" if device == "cpu" else OUTPUT)
        results = Results(Path(output) if output and is_first else None, head, COLUMNS, append=True)
        if is_first:
            print(*(f"{name}: {value}" for name, value in head.items()), sep="\n")
            print(f"changed for this machine: {' '.join(changes) or 'nothing'}", flush=True)
        for task in _tasks(options):
            row = {"preset": options.preset, **_row(task, ask, deadline - time.monotonic(), is_alone)}
            profiled: Row = {name: row.pop(name) for name in ("largest", "gap_percent") if name in row}
            add_gains(row, results.rows)
            results.add(row)
            if is_first:
                print(" | ".join(f"{name} {_short(row[name])}" for name in COLUMNS if name in row), flush=True)
            if is_alone and row["status"].startswith("failed"):
                worker.close()  # a new process takes the next row
            if profiled and is_first:
                results.note(profile=profiled)
                print(_profile_text(profiled, task.trace))
    except WorkerFailed as error:
        raise UserError(f"the device cannot be measured: {error}") from error
    finally:
        end()
    if is_first:
        print("\n" + table(results.rows, ("preset", "layout", "fused", *FIGURES, "status")))
        if device == "cuda":
            print(_target_text(results.rows))
        print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")
    return int(any(row["status"] not in ("ok", TIME_UP) for row in results.rows))


def _start(config: Config, plan: Plan, device: str, changes: list[str]) -> Callable[[StepRow | None], Any]:
    return StepBench(config, plan, device, changes).answer


Ask = Callable[[StepRow | None, float], Any]


def _ask_worker(worker: Worker) -> Ask:
    def ask(task: StepRow | None, seconds: float) -> Any:
        if task is not None:
            worker.ask(None, START_LIMIT_S)  # a process that was lost starts again here
        return worker.ask(task, seconds)

    return ask


def _tasks(options: Options) -> list[StepRow]:
    choices = CHOICES if options.table5 else (FUSED,)
    tasks = [StepRow(layout, fused) for layout in options.layouts for fused in choices]
    traced = next(number for number, task in enumerate(tasks) if task.fused == FUSED)
    tasks[traced] = StepRow(tasks[traced].layout, FUSED, trace=options.profile)
    return tasks


def _row(task: StepRow, ask: Ask, left_s: float, is_alone: bool) -> Row:
    if is_alone and left_s <= 0:
        return {"layout": task.layout, "fused": task.fused, "status": TIME_UP}
    try:
        return ask(StepRow(task.layout, task.fused, left_s, task.trace), left_s + ROW_GRACE_S)
    except WorkerFailed as error:
        return {"layout": task.layout, "fused": task.fused, "status": f"failed: {error}"}


def _preset(words: Sequence[str], config: Config) -> str:
    files = [word for word in words if word.endswith((".yaml", ".yml")) or word in preset_names()]
    return Path(files[-1]).stem if files else f"hidden {config.model.hidden_size}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _profile_text(profiled: dict[str, Any], trace: str) -> str:
    gap = profiled["gap_percent"]
    gaps = "" if gap is None else f"\nno kernel ran for {gap:.1f}% of the time"
    return f"{table(profiled['largest'], ('percent', 'ms', 'count', 'name'))}{gaps}\nwrote {trace}"


def _target_text(rows: Sequence[Row]) -> str:
    lines = []
    for preset, least in TARGETS.items():
        reached = [row["mfu_percent"] for row in rows if _is_targeted(row, preset)]
        result = "not measured" if not reached else "met" if max(reached) >= least else "missed"
        lines.append(f"target for one H100 or H200: {preset} at {least:g}% MFU of real tokens: {result}")
    return "\n".join(lines)


def _is_targeted(row: Row, preset: str) -> bool:
    return (row["preset"], row["layout"], row["fused"], row["status"]) == (preset, "packed", FUSED, "ok")


if __name__ == "__main__":
    run_tool(main, report=is_first_process())
