"""Saves beside the training: what is written is the state of their step, in equal shares, whenever the process dies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from metro_megatron.checkpoint import writing
from metro_megatron.checkpoint.files import newest_step, tracked_step, verify_integrity
from metro_megatron.checkpoint.publish import UNFINISHED
from metro_megatron.checkpoint.saving import Exchange
from metro_megatron.checkpoint.writing import SummedFile, Written
from metro_megatron.config.schema import Config
from metro_megatron.train import saves as module
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import run_steps, small_config, start, use_small_buckets

KILLS = int(os.environ.get("METRO_KILLS", 20))


def config_for(run: Path, tp: int = 1) -> Config:
    parallel = {"tensor_model_parallel_size": tp}
    return small_config(parallel=parallel, train={"output": str(run)}, checkpoint={"keep_last": 2})


def begin(trainer: Trainer, step: int) -> None:
    trainer.progress.done = step
    trainer.saves.keep(step, trainer._state, lambda lines: None, is_end=False)


def save_both_ways(config: Config, copy: Path) -> tuple[bool, list[str]]:
    """On every rank: one state, saved while training waits, and beside more steps by a writer that is slow; whether it
    was there while it was written, and what was said."""
    use_small_buckets()
    trainer = start(config)
    run_steps(trainer, 0, 2)
    trainer.progress.done, trainer.checkpoints.run = 2, copy
    trainer.save(None)
    trainer.checkpoints.run = Path(config.train.output)
    goes_on, write = threading.Event(), writing.write_piece
    said: list[str] = []

    def slow(*arguments: Any) -> Any:
        goes_on.wait()
        return write(*arguments)

    with patch.object(writing, "write_piece", slow), patch.object(module, "LONG_WAIT", 0.1):
        begin(trainer, 2)
        run_steps(trainer, 2, 4)
        is_early = newest_step(trainer.run) is not None
        threading.Timer(0.2, goes_on.set).start()
        trainer.saves.end_save_before(said.extend if trainer.layout.rank == 0 else lambda lines: None, goes_on=True)
    assert trainer.saves.longest > 0.2, "which every rank's watchdog knows"
    trainer.close()
    return is_early, said


def test_a_save_beside_the_training_is_that_of_its_step_and_ranks_write_equal_shares(tmp_path: Path) -> None:
    """Every file of tensors has the same bytes, on two data-parallel times two tensor-parallel ranks."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    copy.mkdir()
    (is_early, said), *others = run_ranks(save_both_ways, 4, config_for(run, tp=2), copy)
    assert not is_early and said[0].startswith(f"saved {run / 'iter_0000002'} in ") and "stood still" in said[0]
    assert said[1].startswith("warning: waited ") and "checkpoint.save_interval" in said[1] and len(said) == 2
    assert [lines for _, lines in others] == [[]] * 3, "the first rank speaks"
    of_run, of_copy = (_tensor_files(one / "iter_0000002") for one in (run, copy))
    assert of_run == of_copy and tracked_step(run) == tracked_step(copy) == 2
    verify_integrity(run / "iter_0000002")
    shares: Counter[str] = Counter()
    for name, entry in of_run.items():
        shares[name.split("_")[2]] += entry["bytes"]
    mean = sum(shares.values()) / 4
    assert all(abs(share - mean) < 0.05 * mean for share in shares.values()), shares


def _tensor_files(folder: Path) -> dict[str, Any]:
    files = json.loads((folder / "integrity.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("is_handed", [True, False])
def test_what_ranks_have_told_does_not_stay_in_their_store(is_handed: bool) -> None:
    """It would grow with every save of a run."""
    store = torch.distributed.HashStore()
    ranks = [Exchange(store, "one", rank, 2) for rank in range(2)]
    before = store.num_keys()
    told = [Written(problem=f"of rank {rank}") for rank in range(2)]
    for exchange, written in zip(ranks, told, strict=True):
        exchange.tell(written)
    if is_handed:
        ranks[0].hand(told)
    assert ranks[0].hear() == told and store.num_keys() == before


def test_sums_of_what_is_written_are_the_file_s(tmp_path: Path) -> None:
    with SummedFile(tmp_path / "file") as file:
        torch.save(torch.arange(100_000), file)
        torch.save(torch.zeros(3), file)
    written = (tmp_path / "file").read_bytes()
    assert file.sums.found() == {
        "crc32": f"{zlib.crc32(written):08x}",
        "sha256": hashlib.sha256(written).hexdigest(),
    }


def states(trainer: Trainer) -> Iterator[tuple[int, torch.Tensor]]:
    """Every weight and moment of a lone rank, with a number of its own."""
    tensors = [
        tensor
        for one in trainer.optimizer.both
        for group in one.optimizer.param_groups
        for weight in group["params"]
        for tensor in (weight, one.optimizer.state[weight]["exp_avg"], one.optimizer.state[weight]["exp_avg_sq"])
    ]
    yield from enumerate(tensors)


def state_at(step: int, number: int, tensor: torch.Tensor) -> torch.Tensor:
    """In place of what training would have made of it."""
    return torch.arange(tensor.numel()).reshape(tensor.shape).float().sin().add(number + step)


def save_until_killed(config: Config, when: float) -> None:
    """Go on from the newest whole checkpoint, all of which must be of its step, and save one state after another.

    when: of the moment of the end, in times of the first save, behind it.
    """
    trainer = start(config)
    trainer.restore()
    if trainer.progress.done:
        assert all(tensor.equal(state_at(trainer.progress.done, number, tensor)) for number, tensor in states(trainer))
    else:
        run_steps(trainer, 0, 1)
    begun = time.monotonic()
    for step in count(trainer.progress.done + 1):
        with torch.no_grad():
            for number, tensor in states(trainer):
                tensor.copy_(state_at(step, number, tensor))
        for one in trainer.optimizer.both:
            one._copy_main_params_to_model_params()
        begin(trainer, step)
        if begun:
            trainer.checkpoints.wait()
            seconds, begun = when * (time.monotonic() - begun), 0.0
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


@pytest.mark.long
@pytest.mark.timeout(100 + 10 * KILLS)
def test_killed_at_any_moment_of_saves_the_newest_whole_checkpoint_is_bit_equal(tmp_path: Path) -> None:
    """KILLS times, each in a new process of the same run."""
    config, rng = config_for(tmp_path), random.Random(1)
    config = replace(config, train=replace(config.train, train_steps=100 * KILLS))
    num_cut = 0
    for _ in range(KILLS):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_ranks(save_until_killed, 1, config, rng.uniform(0.0, 2.0))
        num_cut += any(tmp_path.glob(f"*{UNFINISHED}"))
        for folder in tmp_path.glob("iter_*[0-9]"):
            verify_integrity(folder)
    assert num_cut > KILLS / 4 and (newest_step(tmp_path) or 0) >= KILLS
