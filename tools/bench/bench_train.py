"""Time whole optimizer steps of a configuration on one device, or on the processes of torchrun.

Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused.dispatch import describe
from metro_megatron.cli.command_line import exit_code
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train.launch import choose_device, is_first_process
from tools.bench.figures import state_bytes
from tools.bench.isolation import Worker, WorkerFailed
from tools.bench.provenance import provenance
from tools.bench.results import Results, Row, table
from tools.bench.training import CHOICES, FUSED, TIME_UP, Plan, Session, Task, add_gains, bench_config, prepare_data

OUTPUT = "docs/benchmarks/train"
START_LIMIT_S, ROW_GRACE_S = 180.0, 60.0
"""How long a process may take to start; and a row beyond its time, which is for steps: it builds the model too."""
TARGETS = {"base": 50.0, "xxl": 60.0}
"""Percent of the matrix rate on real tokens, packed, all operators fused, on one H200."""
FIGURES = (
    *("seconds_per_step", "tokens_per_s", "slot_tokens_per_s", "pad_percent", "tflops", "mfu_percent", "peak_gb"),
    *("data_percent", "speed_gain_percent", "memory_gain_percent"),
)
COLUMNS = (
    *("preset", "layout", "fused", "status", *FIGURES, "gflop_per_token", "steps", "processes", "micro_batches"),
    *("micro_batch_tokens", "precision", "recompute", "changes"),
)


def main(argv: Sequence[str]) -> int:
    """0: every row ran, or the time was up; 1: a row failed."""
    options, rest = _parse(argv)
    if min(options.micro_batches, options.warm_up, options.steps) < 1:
        raise UserError("--micro_batches, --warm_up, --steps: must be positive")
    config = parse_config(rest)
    options.preset = options.preset or _preset(rest, config)
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
            **provenance(torch.device(device), ["python", "-m", "tools.bench.bench_train", *argv], options.commit),
            "operators": describe(torch.device(device)),
        }
        return _run(options, config, plan, device, changes, head, deadline)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--layouts", nargs="+", choices=("packed", "padded"), default=["packed", "padded"])
    parser.add_argument("--micro_batches", type=int, default=8, help="of a step and data-parallel rank")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--budget_s", type=float, default=480.0, help="seconds for everything; what is left is not run")
    parser.add_argument("--table5", action="store_true", help="no operator fused, each alone, all: the paper's Table 5")
    parser.add_argument("--profile", default="", help="trace of 2 steps of the first layout: .json or .json.gz")
    parser.add_argument("--output", default="", help=f"results without ending (default: {OUTPUT}; on the CPU none)")
    parser.add_argument("--preset", default="", help="name in the results (default: that of the last --config)")
    parser.add_argument("--commit", default="", help="commit to note where the copy has no git")
    return parser.parse_known_args(argv)


def _run(
    options: argparse.Namespace, config: Config, plan: Plan, device: str, changes: list[str], head: Row, deadline: float
) -> int:
    is_alone, is_first = plan.processes == 1, is_first_process()
    ask: Ask
    if is_alone:
        worker = Worker(_start, config, plan, device, changes)
        ask, end = _ask_worker(worker), worker.close
    else:
        session = Session(config, plan, device, changes)
        ask, end = (lambda task, seconds: session.answer(task)), session.leave
    try:
        ceilings = ask(None, START_LIMIT_S)
        head |= {"matrix_tflops": ceilings.matrix_tflops, "state_gb": state_bytes(config.model) / 1e9}
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


def _start(config: Config, plan: Plan, device: str, changes: list[str]) -> Callable[[Task | None], Any]:
    return Session(config, plan, device, changes).answer


Ask = Callable[[Task | None, float], Any]


def _ask_worker(worker: Worker) -> Ask:
    def ask(task: Task | None, seconds: float) -> Any:
        if task is not None:
            worker.ask(None, START_LIMIT_S)  # a process that was lost starts again here
        return worker.ask(task, seconds)

    return ask


def _tasks(options: argparse.Namespace) -> list[Task]:
    choices = CHOICES if options.table5 else (FUSED,)
    tasks = [Task(layout, fused) for layout in options.layouts for fused in choices]
    traced = next(number for number, task in enumerate(tasks) if task.fused == FUSED)
    tasks[traced] = Task(tasks[traced].layout, FUSED, trace=options.profile)
    return tasks


def _row(task: Task, ask: Ask, left_s: float, is_alone: bool) -> Row:
    if is_alone and left_s <= 0:
        return {"layout": task.layout, "fused": task.fused, "status": TIME_UP}
    try:
        return ask(Task(task.layout, task.fused, left_s, task.trace), left_s + ROW_GRACE_S)
    except WorkerFailed as error:
        return {"layout": task.layout, "fused": task.fused, "status": f"failed: {error}"}


def _preset(words: Sequence[str], config: Config) -> str:
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
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
        lines.append(f"target for one H200: {preset} at {least:g}% MFU of real tokens: {result}")
    return "\n".join(lines)


def _is_targeted(row: Row, preset: str) -> bool:
    return (row["preset"], row["layout"], row["fused"], row["status"]) == (preset, "packed", FUSED, "ok")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), report=is_first_process()))
