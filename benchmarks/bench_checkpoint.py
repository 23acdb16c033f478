"""Saving and loading a checkpoint beside writing and reading as many bytes, in turn, on one disk."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from benchmarks.bench_cpu import CPU, SIZES
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.training import Plan, prepare_data
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.train.launch import import_megatron

if TYPE_CHECKING:
    from metro_megatron.train.trainer import Trainer

COLUMNS = ("what", "seconds", "gb_per_s", "beside", "ratio", "lower_quartile", "upper_quartile", "rounds")
BESIDE = {
    "write": "write",
    "save": "write",
    "stopped": "save",
    "read": "read",
    "hashes": "read",
    "load": "read",
}
"""What is measured, and what of the same round its rate is compared with."""
BLOCK = 1 << 24


@dataclass(frozen=True)
class Options:
    """How often, on which disk, where to."""

    rounds: Annotated[int, at_least(1)] = 7
    """Of each one save and load."""
    folder: str = ""
    """On the disk that is measured; a temporary folder by default."""
    size: Literal["demo", "larger"] = "larger"
    """Of bench_cpu: demo or larger, whose checkpoint has 0.4 GB."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/checkpoint; none are written by default."""


def main(options: Options) -> None:
    """Saving and loading a checkpoint beside writing and reading as many bytes, in turn, on one disk.

    write: the files' bytes from memory, a thread a file, with fsync. save: a checkpoint while the training waits.
    stopped: how long the training waits for one that is written beside it. read: the files, a thread each. hashes: what
    looks at them before they are loaded. load: both, into the model. Files are not in the system's cache when they are
    read first. A ratio is of rates in one round: 1 is as fast as the disk alone; of `stopped`, of times to `save`.
    """
    output = Path(options.output) if options.output else None
    results = Results(output, provenance(CPU, ["python", "-m", "benchmarks.bench_checkpoint", *sys.argv[1:]]), COLUMNS)
    with (
        tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=options.folder or None) as folder,
        _trainer(options.size, Path(folder)) as trainer,
    ):
        rounds = [_round(trainer, step) for step in range(1, 2 + options.rounds)][1:]  # the first warms up
        size = sum(path.stat().st_size for path in _files(trainer, 1 + options.rounds))
    for row in _rows(rounds, size):
        results.add(row)
    print(table(results.rows, COLUMNS))
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


@contextmanager
def _trainer(size: str, folder: Path) -> Iterator[Trainer]:
    import_megatron()
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.trainer import Trainer

    config = SIZES[size]()
    config = replace(config, data=replace(config.data, train=[], validation=[]))
    config = prepare_data(config, Plan(warm_up=0, steps=1), folder)
    config = replace(
        config,
        train=replace(config.train, output=str(folder / "run")),
        checkpoint=replace(config.checkpoint, keep_last=1),
    )
    trainer = Trainer(config, Corpus.open(config), CPU)
    trainer.run.mkdir()
    gc.freeze()  # as a run does
    try:
        yield trainer
    finally:
        trainer.close()


def _files(trainer: Trainer, step: int) -> list[Path]:
    from metro_megatron.checkpoint.files import iteration_folder

    return sorted(iteration_folder(trainer.run, step).glob("*.distcp"))


def _round(trainer: Trainer, step: int) -> dict[str, float]:
    """Seconds of each."""
    from metro_megatron.checkpoint.files import verify_integrity

    trainer.progress.done = step
    seconds = {"save": _timed(trainer.save)}
    begin = time.perf_counter()
    trainer.saves.keep(step, trainer._state, lambda lines: None, is_end=False)
    seconds["stopped"] = time.perf_counter() - begin
    trainer.checkpoints.wait()
    files = _files(trainer, step)
    seconds["write"] = _timed(lambda: _write(files, trainer.run))
    for what, action in (
        ("read", lambda: _read(files)),
        ("hashes", lambda: verify_integrity(files[0].parent)),
        ("load", trainer.restore),
    ):
        _forget(files)
        seconds[what] = _timed(action)
    return seconds


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _write(files: list[Path], folder: Path) -> None:
    """As many bytes as each file has, beside each other, to the disk; the files go again."""
    block = os.urandom(BLOCK)

    def write(file: Path) -> None:
        with (folder / f"raw_{file.name}").open("wb", buffering=0) as raw:
            left = file.stat().st_size
            while left:
                left -= raw.write(block[:left])
            os.fsync(raw.fileno())

    with ThreadPoolExecutor(len(files)) as threads:
        list(threads.map(write, files))
    for file in files:
        (folder / f"raw_{file.name}").unlink()


def _read(files: list[Path]) -> None:
    def read(file: Path) -> None:
        block = bytearray(BLOCK)
        with file.open("rb", buffering=0) as raw:
            while raw.readinto(block):
                pass

    with ThreadPoolExecutor(len(files)) as threads:
        list(threads.map(read, files))


def _forget(files: list[Path]) -> None:
    """Have the system forget what it knows of the files' contents."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rows(rounds: list[dict[str, float]], size: int) -> Iterator[Row]:
    for what, beside in BESIDE.items():
        if what == "stopped":
            ratios = [one[what] / one[beside] for one in rounds]
        else:
            ratios = [one[beside] / one[what] for one in rounds]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        seconds = statistics.median(one[what] for one in rounds)
        row = (what, seconds, size / seconds / 1e9, beside, median, low, high, len(rounds))
        yield dict(zip(COLUMNS, row, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_tool(main)
