"""A save of nothing before the first step: what the storage refuses is said while there is nothing to lose."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from metro_megatron.checkpoint.files import TRIAL, file_entries
from metro_megatron.errors import UserError
from metro_megatron.files import move_whole, replace_text, sync_folder
from metro_megatron.parallel.layout import Layout

CONTENT = bytes(range(256)) * 4096
"""What each rank writes: 1 MiB, more than a file system keeps beside a file's name."""


def try_saving(run: Path, layout: Layout) -> None:
    """Write, sync, read, rename, replace and remove in the run folder as a save does, on all ranks, and leave nothing.

    A collective call. Raises UserError, on every rank, naming what was refused, and to which rank.
    """
    trial = _Trial(run, layout.rank)
    steps: tuple[tuple[Callable[[], None], bool], ...] = (
        (trial.begin, False),
        (trial.write, True),
        (trial.publish, False),
        (trial.remove, False),
    )
    for step, is_for_all in steps:
        said: list[str] = [""] * layout.world.size()
        own = _problem(step, run, layout.rank) if is_for_all or layout.rank == 0 else ""
        dist.all_gather_object(said, own, group=layout.world)
        if any(said):
            if layout.rank == 0:
                trial.clear()
            raise UserError([problem for problem in said if problem])


class _Trial:
    """The steps of a save, which ranks do one after the other."""

    def __init__(self, run: Path, rank: int):
        self.run = run
        self.unfinished = run / f"{TRIAL}.unfinished"
        self.finished = run / TRIAL
        self.tracker = run / f"{TRIAL}.txt"
        self.own = self.unfinished / f"__{rank}_0"

    def begin(self) -> None:
        self.clear()
        self.unfinished.mkdir()

    def write(self) -> None:
        with self.own.open("wb") as file:
            file.write(CONTENT)
            file.flush()
            os.fsync(file.fileno())
        entry = file_entries([self.own])[self.own.name]
        if entry["sha256"] != hashlib.sha256(CONTENT).hexdigest():
            raise OSError(f"{self.own}: is not read as it was written")

    def publish(self) -> None:
        """On the first rank, over an earlier folder and an earlier tracker, as in a run that went back."""
        sync_folder(self.unfinished)
        self.finished.mkdir()
        move_whole(self.unfinished, self.finished)
        for step in ("0\n", "1\n"):
            replace_text(self.tracker, step)

    def remove(self) -> None:
        shutil.rmtree(self.finished)
        self.tracker.unlink()

    def clear(self) -> None:
        """Remove what an interrupted start, or a failed one, has left."""
        for folder in (self.unfinished, self.finished):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.run.glob(f"{TRIAL}*"):
            with suppress(OSError):
                file.unlink()


def _problem(step: Callable[[], None], run: Path, rank: int) -> str:
    """What was in the way of a step; empty: nothing."""
    try:
        step()
    except OSError as error:
        remedy = "make room, mend its storage or its permissions, or give another train.output"
        who = f"rank {rank} on {socket.gethostname()}"
        return f"{error} ({who}): nothing could be saved in {run.absolute()}; {remedy}"
    return ""
