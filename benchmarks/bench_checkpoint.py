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
import torch.distributed as dist

from benchmarks.bench_cpu import CPU, SIZES
from benchmarks.processes import ROOT
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.training import Plan, prepare_data
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config, DataConfig, TrainConfig
from metro_megatron.train.launch import import_megatron

if TYPE_CHECKING:
    from metro_megatron.train.trainer import Trainer

COLUMNS = (
    *("what", "seconds", "cpu_seconds", "gb_per_s", "beside", "ratio"),
    *("lower_quartile", "upper_quartile", "processes", "rounds"),
)
BESIDE = {
    "write": "write",
    "save": "write",
    "copy": "copy",
    "stopped": "copy",
    "gathered": "copy",
    "step": "step",
    "read": "read",
    "sums": "read",
    "load": "read",
    "read_warm": "read_warm",
    "load_warm": "read_warm",
}
"""What is measured, and what of the same round its rate is compared with."""
INTERVAL = 1000
"""Steps between two saves."""
BLOCK = 1 << 24


@dataclass(frozen=True)
class Options:
    """How often, on which disk, where to."""

    rounds: Annotated[int, at_least(1)] = 7
    """Of each one save and load."""
    folder: str = ""
    """On the disk that is measured; a temporary folder by default."""
    size: Literal["demo", "larger", "base"] = "larger"
    """Of bench_cpu, demo or larger, whose checkpoint has 0.4 GB; or of examples/base.yaml, 3.4 GB, for which it takes
    12 GB of memory."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/checkpoint_larger; none are written by default."""


def main(options: Options) -> None:
    """Saving and loading a checkpoint beside writing and reading as many bytes, in turn, on one disk.

    write: the files' bytes from memory, a thread a file, with fsync. save: a checkpoint while the training waits.
    copy: of all that is saved into fresh memory. stopped: how long the training waits for a checkpoint that is written
    beside it. gathered: what megatron-core's format would have it wait for before a copy. step: of training. read: the
    files, a thread each. sums: CRC-32 of them alone. load: into the model, summed by what is read. Files are not
    in the system's cache when these three read them, and are there for read_warm and load_warm. A ratio is of rates in
    one round: 1 is as fast as the disk, or the copy, alone. Processor time is the first rank's, all threads. Runs under
    torchrun, too, where each rank reads and writes its own files.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output = Path(options.output) if options.output and rank == 0 else None
    head = provenance(CPU, ["python", "-m", "benchmarks.bench_checkpoint", *sys.argv[1:]])
    with (
        tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=options.folder or None) as folder,
        _trainer(options.size, _of_first_rank(Path(folder))) as trainer,
    ):
        rounds = [_round(trainer, step) for step in range(1, 2 + options.rounds)][1:]  # the first warms up
        size = sum(path.stat().st_size for path in _files(trainer, 1 + options.rounds))
    if rank:
        return
    results = Results(output, head, COLUMNS)
    for row in _rows(rounds, size):
        results.add({**row, "processes": world_size})
    share = statistics.median(one["stopped"][0] / (INTERVAL * one["step"][0]) for one in rounds)
    print(table(results.rows, COLUMNS))
    print(f"training waits for a save every {INTERVAL} steps {100 * share:.2g}% of their time")
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


def _of_first_rank(folder: Path) -> Path:
    folders = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(folders)
    return folders[0]


def base() -> Config:
    """examples/base.yaml's pair in FP32; a step is one sample, so that what a save takes of it says nothing."""
    config = parse_config(["--config", str(ROOT / "examples" / "base.yaml")])
    return replace(
        config,
        data=DataConfig(micro_batch_tokens=config.data.seq_length),
        train=TrainConfig(global_batch_tokens=config.data.seq_length, precision="fp32", device="cpu"),
    )


@contextmanager
def _trainer(size: str, folder: Path) -> Iterator[Trainer]:
    import_megatron()
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.trainer import Trainer

    config = {**SIZES, "base": base}[size]()
    config = replace(config, data=replace(config.data, train=[], validation=[]))
    if not dist.is_initialized() or dist.get_rank() == 0:
        config = prepare_data(config, Plan(warm_up=0, steps=1), folder)
    if dist.is_initialized():
        configs = [config]
        dist.broadcast_object_list(configs)
        (config,) = configs
    config = replace(
        config,
        train=replace(config.train, output=str(folder / "run")),
        checkpoint=replace(config.checkpoint, keep_last=1),
    )
    trainer = Trainer(config, Corpus.open(config), CPU)
    trainer.run.mkdir(exist_ok=True)
    gc.freeze()  # as a run does
    try:
        yield trainer
    finally:
        trainer.close()


def _files(trainer: Trainer, step: int) -> list[Path]:
    from metro_megatron.checkpoint.files import iteration_folder

    return sorted(iteration_folder(trainer.run, step).glob("*.distcp"))


Times = tuple[float, float]
"""Seconds by the clock, and of this process' processor time."""


def _round(trainer: Trainer, step: int) -> dict[str, Times]:
    from metro_megatron.checkpoint.files import files_of_rank, verify_integrity

    rank, world_size = trainer.layout.rank, trainer.layout.world.size()
    trainer.progress.done = step
    times = {"step": _timed(lambda: _step(trainer)), "save": _timed(trainer.save)}
    times["copy"] = _timed(lambda: _copy(trainer))
    times["gathered"] = _timed(lambda: _gather(trainer))
    times["stopped"] = _timed(lambda: trainer.saves.keep(step, trainer._state, lambda lines: None, is_end=False))
    trainer.checkpoints.wait()
    every = _files(trainer, step)
    names = set(files_of_rank(every[0].parent, rank, world_size))
    files = [file for file in every if file.name in names]
    times["write"] = _timed(lambda: _write(files, trainer.run))
    for what, action in (
        ("read", lambda: _read(files)),
        ("sums", lambda: verify_integrity(every[0].parent, names)),
        ("load", trainer.restore),
    ):
        _forget(every)
        times[what] = _timed(action)
    times["read_warm"] = _timed(lambda: _read(files))
    times["load_warm"] = _timed(trainer.restore)
    return times


def _timed(action: Callable[[], object]) -> Times:
    """Of all ranks, from one moment until the last has ended."""
    dist.barrier()
    begin, used = time.perf_counter(), time.process_time()
    action()
    own = time.process_time() - used
    dist.barrier()
    return time.perf_counter() - begin, own


def _step(trainer: Trainer) -> None:
    from metro_megatron.train.metrics import MetricSums

    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms)).read()


def _copy(trainer: Trainer) -> list[torch.Tensor]:
    """As much as this rank writes."""
    from metro_megatron.checkpoint.sharded_state import sharded_state

    state = sharded_state(trainer.pair, trainer.optimizer, trainer.layout)
    files = trainer.checkpoints._planner.plan(state, trainer.run).files
    return [tensor.clone() for share in files.values() for _, tensor in share if tensor is not None]


def _gather(trainer: Trainer) -> None:
    from metro_megatron.checkpoint.sharded_state import of_model

    model = dict(enumerate(of_model(trainer.pair, trainer.layout)))
    how = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    trainer.optimizer.chained.sharded_state_dict(model, is_loading=False, metadata=how)


def _write(files: list[Path], folder: Path) -> None:
    """As many bytes as each file has, beside each other, to the disk; the files go again."""
    block = os.urandom(BLOCK)

    def write(file: Path) -> None:
        with (folder / f"raw_{file.name}").open("wb", buffering=0) as raw:
            left = file.stat().st_size
            while left:
                left -= raw.write(block[:left])
            os.fsync(raw.fileno())

    with ThreadPoolExecutor(max(1, len(files))) as threads:
        list(threads.map(write, files))
    for file in files:
        (folder / f"raw_{file.name}").unlink()


def _read(files: list[Path]) -> None:
    def read(file: Path) -> None:
        block = bytearray(BLOCK)
        with file.open("rb", buffering=0) as raw:
            while raw.readinto(block):
                pass

    with ThreadPoolExecutor(max(1, len(files))) as threads:
        list(threads.map(read, files))


def _forget(files: list[Path]) -> None:
    """Have the system forget what it knows of the files' contents."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rows(rounds: list[dict[str, Times]], size: int) -> Iterator[Row]:
    for what, beside in BESIDE.items():
        ratios = [one[beside][0] / one[what][0] for one in rounds]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        seconds, cpu_seconds = (statistics.median(one[what][kind] for one in rounds) for kind in (0, 1))
        rate = "" if what == "step" else size / seconds / 1e9
        row = (what, seconds, cpu_seconds, rate, beside, median, low, high, "", len(rounds))
        yield dict(zip(COLUMNS, row, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_tool(main)
