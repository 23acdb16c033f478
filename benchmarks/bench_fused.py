"""Check and time the fused operators against what a user would take instead, in one call on one GPU.

Needs torch, Triton, numpy, and this checkout on PYTHONPATH, of which it takes metro_megatron's command line too.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from benchmarks.clock import Ceilings
from benchmarks.contestants import CONTESTANTS
from benchmarks.fused_rows import COLUMNS, NOT_RUN, OK, OperatorBench, OperatorRow, tasks
from benchmarks.isolation import Handler, Worker, WorkerFailed
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.targets import judge
from fused.dispatch import OPERATOR_NAMES, describe, use_kernel
from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError

OUTPUT = "docs/benchmarks/fused"
START_LIMIT_S, ROW_LIMIT_S = 90.0, 90.0
"""A process that starts, or a row, is given up after this long."""
SHOWN = (
    *("operator", "size", "contestant", "forward_ms", "backward_ms", "forward_rate", "backward_rate", "both_rate"),
    *("both_percent", "peak_mb", "check", "status"),
)
RIVALS = sorted({name for contestants in CONTESTANTS.values() for name in contestants} - {"ours"})


@dataclass(frozen=True)
class Options:
    """What is measured, where, how long."""

    output: str = ""
    """Results without ending; by default docs/benchmarks/fused, with cpu none."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a trial at tiny sizes."""
    operators: list[str] = field(default_factory=lambda: list(OPERATOR_NAMES))
    """Operators that are measured."""
    against: list[str] = field(default_factory=lambda: list(RIVALS))
    """What they are compared with; --against=[] for nothing."""
    presets: list[str] = field(default_factory=list)
    """Sizes that are measured: base, large, xl, xxl; by default all, and other heads and lengths."""
    budget_s: float = 480.0
    """Seconds for everything; what is left is not run."""
    commit: str = ""
    """Commit to note where the copy has no git."""


def main(options: Options) -> int:
    """Check and time the fused operators against what a user would take instead, in one call on one GPU.

    Exit codes: 0 all of ours ran and was right, 1 not so, 2 nothing could be measured, with the reason.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch finds no GPU: run this on a machine with one (nvidia-smi shows it), or try the tool out with "
            "--device cpu"
        )
    try:
        todo = tasks(options.operators, options.against, options.device == "cpu", options.presets)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    device, started = torch.device(options.device), time.monotonic()
    if device.type == "cuda" and not use_kernel(OPERATOR_NAMES[0], torch.empty(0, device=device)):
        raise UserError(f"there is nothing to measure. {describe(device)}")
    worker = Worker(_start, options.device)
    try:
        ceilings = _ceilings(worker)
        head = {
            **provenance(device, ["python", "-m", "benchmarks.bench_fused", *sys.argv[1:]], options.commit),
            "is_trial": device.type == "cpu",
            "operators": describe(device),
            "copy_gb_per_s": ceilings.copy_gb_per_s,
            "matrix_tflops": ceilings.matrix_tflops,
        }
        print(*(f"{name}: {value}" for name, value in head.items()), sep="\n", flush=True)
        output = options.output or ("" if device.type == "cpu" else OUTPUT)
        results = Results(Path(output) if output else None, head, COLUMNS)
        _run(todo, worker, results, started + options.budget_s)
    except WorkerFailed as error:
        raise UserError(f"the device cannot be measured: {error}") from error
    finally:
        worker.close()
    verdicts = [verdict.row() for verdict in judge(results.rows)]
    results.note(targets=verdicts, seconds=round(time.monotonic() - started, 1))
    print("\n" + table(results.rows, SHOWN))
    print("\nTargets, for one H100 or H200; worst of all sizes measured:\n" + table(verdicts, tuple(verdicts[0])))
    if device.type == "cpu":
        print("\nA trial on the CPU at tiny sizes: its times mean nothing.")
    if output:
        print(f"\nwrote {output}.json and {output}.csv")
    return int(not all(_is_right(row) for row in results.rows))


def _start(device: str) -> Handler:
    """In the process that measures. The first question, None, asks for the ceilings."""
    session = OperatorBench(torch.device(device))
    return lambda task: session.ceilings if task is None else session.row(task)


def _ceilings(worker: Worker) -> Ceilings:
    return worker.ask(None, START_LIMIT_S)


def _run(todo: Sequence[OperatorRow], worker: Worker, results: Results, deadline: float) -> None:
    """A row for every task: measured, failed, or not run because the time was up."""
    for number, task in enumerate(todo):
        left = deadline - time.monotonic()
        seconds = min(1.0, left / (len(todo) - number) / 6)
        if left <= 0:
            row: Row = {**task.head(), "status": f"{NOT_RUN}: the time was up (--budget_s)"}
        else:
            row = _row(OperatorRow(task.case, task.contestant, seconds), worker, max(20.0, min(ROW_LIMIT_S, left)))
        results.add(row)
        shown = [str(row[name]) for name in ("operator", "size", "contestant", "status")]
        print(f"[{number + 1}/{len(todo)}, {left:.0f} s left]", " | ".join(shown), row.get("check", ""), flush=True)


def _row(task: OperatorRow, worker: Worker, limit_s: float) -> Row:
    try:
        _ceilings(worker)  # a process that was lost starts again here
        row = worker.ask(task, limit_s)
    except WorkerFailed as error:
        return {**task.head(), "status": f"failed: {error}"}
    if row.pop("is_device_lost"):
        worker.close()
    return row


def _is_right(row: Row) -> bool:
    """Ours must run and be right; time that was up, and other contestants, are no fault."""
    is_excused = row["contestant"] != "ours" or row["status"].startswith(NOT_RUN)
    return is_excused or (row["status"] == OK and row["check"] == OK)


if __name__ == "__main__":
    run_tool(main)
