"""What comparing blocks with their checksums costs the loader: processor time, and bytes read from the disk."""

import json
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, cast
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loading import SEQ_LENGTH
from benchmarks.synthetic_shards import write_synthetic_dataset
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.schema import Config
from metro_megatron.data.blocks import BLOCK_BYTES, TokenStreams
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.errors import UserError
from metro_megatron.train.corpus import Corpus

_VOCAB_SIZE = 128_000
"""Ids of 4 bytes, as METRO-LM's."""


@dataclass(frozen=True)
class Options:
    """How much, how often."""

    output: str = ""
    """Path of a .json with the result; empty: it is printed only."""
    tokens: Annotated[int, at_least(100_000)] = 40_000_000
    """Of the dataset, random ones in documents of Wikipedia's lengths; 4 bytes each."""
    epochs: Annotated[int, at_least(1)] = 1
    """Passes over it in a measurement; blocks are compared in the first one only."""
    rounds: Annotated[int, at_least(1)] = 5
    """Measurements with and without, in turn."""


@dataclass(frozen=True)
class Reading:
    """One pass of one rank."""

    cpu_s: float
    bytes_read: int
    """From the disk, of files that were not in memory before."""
    first_cpu_s: float
    """Of the first tenth of the samples, of which nearly each brings a block that is new."""
    first_bytes_read: int
    check_cpu_s: float
    """Of cpu_s, in comparing."""
    page_cpu_s: float
    """Of cpu_s, in the system's bringing pages to where they are compared."""


def main(options: Options) -> None:
    """Measure batches of one rank with and without checksums, in turn, in one process of one thread.

    Steps have 1,048,576 tokens, samples come in random order. Time is the process's own, so that other programs
    disturb it little; the ratio is that of the sums over all rounds. check_share is what comparing takes of the
    processor time with checksums, by the same clock: ratios of runs one after another vary by more than that. Pages
    that a comparison is the first to touch are brought before its time begins, as a loader that does not compare has
    them brought, too, when it reads them; page_share is what that takes. Bytes are those that /proc/self/io counts,
    with the shards dropped from memory before; a file system without a disk (tmpfs) reads none.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        prefix = str(Path(folder) / "synthetic")
        write_synthetic_dataset(Path(prefix), options.tokens, _VOCAB_SIZE)
        read_epochs(prefix, options.epochs, has_checks=True)  # whatever is slow the first time
        readings: dict[bool, list[Reading]] = {True: [], False: []}
        for _ in range(options.rounds):
            for has_checks in random.sample([True, False], 2):
                readings[has_checks].append(read_epochs(prefix, options.epochs, has_checks=has_checks))
    result = compare(readings[True], readings[False]) | vars(options)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def read_epochs(prefix: str, epochs: int, *, has_checks: bool) -> Reading:
    """Make all batches of the first epochs of a dataset whose ids are not in memory."""
    forget(prefix)
    data = _data(prefix, has_checks)
    step, position, end = 0, 0, epochs * data.num_samples
    bytes_before, start = disk_bytes(), time.process_time()
    spent: list[tuple[float, int]] = []
    checks: list[float] = []
    touches: list[float] = []
    with (
        patch.object(TokenStreams, "check", _timed(TokenStreams.check, checks)),
        patch.object(TokenStreams, "_damages", _touching(TokenStreams._damages, touches)),
    ):
        for part in (end // 10, end):
            while position < part:
                position, step = data.step_batch(step, position).end, step + 1
            spent.append((time.process_time() - start, disk_bytes() - bytes_before))
    return Reading(*spent[1], *spent[0], sum(checks) - sum(touches), sum(touches))


def _timed(function: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    """The same, which leaves the processor time of each call."""

    def timed(*arguments: Any) -> None:
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)

    return timed


def _touching(damages: Callable[..., list[str]], seconds: list[float]) -> Callable[..., list[str]]:
    """TokenStreams._damages behind a look at a byte of every page of the blocks, whose processor time is left."""

    def touching(streams: TokenStreams, number: int, blocks: NDArray[np.int64]) -> list[str]:
        content, pages = streams.arrays[number].view(np.uint8), np.arange(0, BLOCK_BYTES, mmap.PAGESIZE)
        start = time.process_time()
        content.take(blocks[:, None] * BLOCK_BYTES + pages, mode="clip")
        seconds.append(time.process_time() - start)
        return damages(streams, number, blocks)

    return touching


def _data(prefix: str, has_checks: bool) -> PretrainingData:
    config = Config()
    model, data = replace(config.model, vocab_size=_VOCAB_SIZE), replace(config.data, train=[prefix])
    corpus = Corpus.open(replace(config, model=model, data=replace(data, seq_length=SEQ_LENGTH)))
    if not has_checks:
        corpus = replace(corpus, train_shards=[replace(shard, checksums=None) for shard in corpus.train_shards])
    layout = SimpleNamespace(data=SimpleNamespace(rank=lambda: 0, size=lambda: 1), device=torch.device("cpu"))
    return corpus.training_data(cast(Any, layout))


def forget(prefix: str) -> None:
    """Drop the ids of a dataset, which nothing may have mapped, from the system's memory of files."""
    for number in range(len(read_manifest(prefix).shards)):
        with DatasetPaths(prefix).shard(number).bin.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """Bytes that this process has had read from disks. Raises UserError where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError as error:
        raise UserError(f"bytes read are counted by Linux's /proc/self/io ({error.strerror})") from error
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def compare(with_checks: Sequence[Reading], without: Sequence[Reading]) -> dict[str, Any]:
    """What comparing takes, and ratios of sums: with checksums to without."""
    names = [field.name for field in fields(Reading)]
    sums = {name: [sum(getattr(one, name) for one in each) for each in (with_checks, without)] for name in names}
    ratios = {f"{name}_ratio": round(one / other, 4) if other else None for name, (one, other) in sums.items()}
    shares = {f"{name}_share": round(sums[f"{name}_cpu_s"][0] / sums["cpu_s"][0], 4) for name in ("check", "page")}
    return shares | ratios | {name: [round(value, 3) for value in values] for name, values in sums.items()}


if __name__ == "__main__":
    run_tool(main)
