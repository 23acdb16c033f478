"""A save of nothing before the first step: what a run folder refuses is said while there is nothing to lose."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from metro_megatron.checkpoint.files import TRIAL
from metro_megatron.checkpoint.publish import check_room
from metro_megatron.errors import UserError
from metro_megatron.files import content_of, move_whole, replace_text, sync_folder
from metro_megatron.parallel.layout import Layout

CONTENT = bytes(range(256)) * 4096
"""What each rank writes: 1 MiB, more than a file system keeps beside a file's name."""
SECONDS_TO_APPEAR = 10.0
"""How long a new file may take to be seen by other machines, whose network file systems remember what was absent."""


def try_saving(run: Path, num_parameters: int, layout: Layout) -> None:
    """See that the run folder has room for so many parameters, and that all ranks see it; write, sync, read, rename,
    replace and remove in it as a save does, on all ranks, and leave nothing.

    A collective call. Raises UserError, on every rank, naming what was refused, and to which rank.
    """
    trial = _Trial(run, num_parameters, layout.rank, layout.of_first_rank(lambda: uuid.uuid4().hex))
    steps: tuple[tuple[Callable[[], None], bool], ...] = (
        (trial.begin, False),
        (trial.see, True),
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

    def __init__(self, run: Path, num_parameters: int, rank: int, name: str):
        """name: of this start alone, as one that was killed may have left its trial."""
        self.run = run
        self.num_parameters = num_parameters
        self.unfinished = run / f"{TRIAL}.unfinished"
        self.finished = run / TRIAL
        self.tracker = run / f"{TRIAL}.txt"
        self.seen = self.unfinished / name
        self.own = self.unfinished / f"__{rank}_0"

    def begin(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        self.clear()
        check_room(self.run, self.num_parameters)
        self.unfinished.mkdir()
        self.seen.touch()

    def see(self) -> None:
        end = time.monotonic() + SECONDS_TO_APPEAR
        while not (is_seen := self.seen.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        if not is_seen:
            raise UserError(
                "does not see what the first rank writes there; it must be one folder for all machines, on "
                "storage that they share"
            )

    def write(self) -> None:
        with self.own.open("wb") as file:
            file.write(CONTENT)
            file.flush()
            os.fsync(file.fileno())
        if content_of(self.own) != CONTENT:
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
    who = f"rank {rank} on {socket.gethostname()}"
    try:
        step()
    except UserError as error:
        return f"train.output {run.absolute()}, {who}: {error}"
    except OSError as error:
        remedy = "make room, mend its storage or its permissions, or give another train.output"
        return f"{error} ({who}): nothing could be saved in {run.absolute()}; {remedy}"
    return ""
