"""All that one GPU can tell in one call of nine minutes: is it right, is it fast, how far from what was predicted.

Needs torch with Triton, numpy, pytest and what `make wheels` collects; no package index and no git.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.contestants import NO_DROPOUT
from benchmarks.provenance import ROOT, provenance
from benchmarks.stages import PASSED, SKIPPED, Record, Stage, run_stages
from benchmarks.summary import write_summary
from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.files import whole_files

OUTPUT = "docs/benchmarks/gpu"
START_S = 20.0
"""Of a stage's limit, for imports and the model."""


@dataclass(frozen=True)
class Options:
    """Where to, which stages, how long."""

    output: str = ""
    """Folder of the results; by default docs/benchmarks/gpu. A trial on the CPU must name one."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a trial, in which what needs a GPU is left out."""
    stages: list[str] = field(default_factory=list)
    """Names of those to run; by default all, in their order."""
    limits: list[str] = field(default_factory=list)
    """Seconds that stages may take instead of their own limits: tests=60 base=90."""
    budget_s: float = 540.0
    """Seconds for everything; the same command goes on where this one stops."""
    commit: str = ""
    """Commit to note, where the copy has no git."""


def main(options: Options) -> int:
    """Test, check and measure on one GPU, stage by stage, each within its time and written down when it ends.

    What has passed is not run again by the same command, unless commit, device or versions have changed. Exit codes: 0
    all that can run here has passed, 1 a stage failed, was stopped at its limit or not reached, 2 nothing could be run,
    with the reason.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: run this on a machine with one, or try it out with --device cpu")
    if device.type == "cpu" and not options.output:
        raise UserError("--output: a trial on the CPU needs a folder, so that it replaces no results of a GPU")
    folder = Path(options.output).absolute() if options.output else ROOT / OUTPUT
    head = provenance(device, ["python", "-m", "benchmarks.bench_gpu", *sys.argv[1:]], options.commit)
    if head["commit"] == "unknown":
        raise UserError("--commit: this copy has no git, so that its commit must be given; results without it are lost")
    stages = chosen(gpu_stages(folder, device, head["commit"]), options.stages, options.limits)
    print(*(f"{name}: {value}" for name, value in head.items()), sep="\n", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stage ends with this process
    record = Record(folder, head)
    for _ in run_stages(stages, record, options.budget_s):
        write_summary(folder)
        write_archive(folder)
    print(
        f"\n{(folder / 'summary.md').read_text()}\nwrote {folder}/summary.md, what it is made of, and {folder}.tar.gz"
    )
    return int(any(record.result(stage) not in (PASSED, SKIPPED) for stage in stages))


def write_archive(folder: Path) -> None:
    """Everything in one file beside the folder, as a machine that is lent may give back few."""
    path = folder.with_name(f"{folder.name}.tar.gz")
    # Traces, the most of it, are compressed already.
    with whole_files([path]) as (file,), tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        archive.add(folder, folder.name)


def chosen(stages: Sequence[Stage], names: Sequence[str], limits: Sequence[str]) -> list[Stage]:
    """The named stages, or all, with other limits. Raises UserError for names that do not exist, and for no numbers."""
    known, problems, seconds = [stage.name for stage in stages], [], dict[str, float]()
    for text in limits:
        name, _, value = text.partition("=")
        if name not in known or not value.isdecimal():
            problems.append(f"--limits: {text} is no STAGE=SECONDS; stages are {', '.join(known)}")
        else:
            seconds[name] = float(value)
    problems += [f"--stages: {name} is not one of {', '.join(known)}" for name in names if name not in known]
    if problems:
        raise UserError(problems)
    return [
        replace(stage, limit_s=seconds.get(stage.name, stage.limit_s))
        for stage in stages
        if not names or stage.name in names
    ]


def gpu_stages(folder: Path, device: torch.device, commit: str) -> list[Stage]:
    """What is right comes first, then what is fast, then what others do."""
    kind, no_gpu = device.type, "" if device.type == "cuda" else "needs a GPU"

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--commit", commit]

    def fused(stage: str, *arguments: str) -> Callable[[float], list[str]]:
        return lambda limit_s: module(
            "bench_fused", "--device", kind, *arguments, *_budget(limit_s), "--output", str(folder / stage)
        )

    def steps(stage: str, preset: str, *arguments: str) -> Callable[[float], list[str]]:
        return lambda limit_s: module(
            "bench_train", "--config", f"examples/{preset}.yaml", "--layouts", "packed", *arguments, *_budget(limit_s),
            "--output", str(folder / stage),
        )  # fmt: skip

    def trace(stage: str) -> tuple[str, ...]:
        return "--warm_up", "3", "--steps", "5", "--profile", str(folder / f"{stage}.trace.json.gz")

    tried = ("--steps", "20", "--precisions", "fp32") if kind == "cpu" else ()
    few = ("--steps", "20", "--every", "5") if kind == "cpu" else ()
    return [
        Stage("tests", "tests of the operators", lambda _: _tests(), 90.0, no_gpu or _missing("pytest")),
        Stage("memory", "memory checker on attention and head", lambda _: _memory(), 35.0, no_gpu or _no_checker()),
        Stage(
            "losses", "200 steps of the demo's model beside the CPU's",
            lambda _: module("same_losses", "--device", kind, *tried, "--output", str(folder / "losses")), 50.0,
        ),
        Stage("operators", "our operators", fused("operators", "--against", NO_DROPOUT), 75.0),
        Stage("base", "steps of base, with a trace", steps("base", "base", *trace("base")), 55.0, no_gpu),
        Stage("large", "steps of large, with a trace", steps("large", "large_pp", *trace("large")), 55.0, no_gpu),
        Stage(
            "learn", "METRO and masked language modeling on a language of hashes",
            lambda limit_s: module(
                "bench_learn", "--device", kind, *few, *_budget(limit_s), "--output", str(folder / "learn")
            ), 60.0,
        ),
        Stage("rivals", "operators beside others'", fused("rivals", "--presets", "base"), 60.0, no_gpu),
        Stage(
            "table5", "steps of base with torch's own operators, with each of ours, with all",
            steps("table5", "base", "--table5", "--warm_up", "2", "--steps", "3"), 60.0, no_gpu,
        ),
    ]  # fmt: skip


def _budget(limit_s: float) -> tuple[str, str]:
    return "--budget_s", f"{max(limit_s - START_S, START_S):.0f}"


def _tests() -> list[str]:
    """Of kernels; compiling for GPUs that are not there needs none, and has been done elsewhere."""
    # Most of the time is Triton's, which compiles about 150 variants of kernels for 1 to 2 s each.
    processes = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    beside = ("-n", str(processes)) if importlib.util.find_spec("xdist") else ()
    skipped = ("-p", "no:cacheprovider", "--ignore", "tests/fused/test_ahead_of_time.py", "-m", "not long")
    return [sys.executable, "-m", "pytest", "-q", *beside, *skipped, "tests/fused"]


def _memory() -> list[str]:
    """Without torch's caching, in whose blocks a wrong access would stay unseen."""
    variables = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    checker = (str(_checker()), "--tool", "memcheck", "--error-exitcode", "1")
    return [*variables, *checker, sys.executable, "-m", "benchmarks.memory_check"]


def _checker() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def _no_checker() -> str:
    return "" if _checker() else "compute-sanitizer is not installed"


def _missing(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


if __name__ == "__main__":
    run_tool(main)
