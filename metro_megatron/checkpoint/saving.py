"""A save that has begun: threads of all ranks write, and the first rank's gives the checkpoint its name.

Ranks tell the first one what they have written through the store that joined them: no collective, which would meet
those of the training. Where all wait for the save it is a collective after all: the store ends with torchrun.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from torch.distributed import Store

from metro_megatron.checkpoint.writing import ShardWriter, Written
from metro_megatron.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_TELL = 30.0
"""How long the first rank waits for others' files when its own process ends: they may have ended before."""


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint."""

    folder: Path
    seconds: float
    """From the beginning of the save until it was on the disk."""
    stopped: float
    """Seconds of these in which nothing was trained."""
    remarks: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What there is to say."""
        beside = f", for {self.stopped:.2f} s of which training stood still" if self.stopped < self.seconds else ""
        return [f"saved {self.folder} in {self.seconds:.1f} s{beside}", *self.remarks]


def unwritten(folder: Path) -> str:
    """Begins a line about a checkpoint whose writing has failed, whatever the system says of it."""
    return (
        f"checkpoint {folder} could not be written (see that the storage of {folder.parent} has room and takes writes; "
        "the same command goes on from the checkpoint before)"
    )


class Exchange:
    """How the first rank learns what others have written: through the store, without a collective, or by `hand`."""

    def __init__(self, store: Store, name: str, rank: int, world_size: int):
        """name: of this save, the same on all ranks."""
        self._store = store
        self._prefix = f"metro_megatron/save/{name}"
        self._rank = rank
        self._world_size = world_size
        self._handed: list[Written] = []
        self._ends = Event()

    def tell(self, written: Written) -> None:
        """On every rank, when its files are on the disk or could not be written."""
        with suppress(RuntimeError):  # the store has ended with torchrun
            self._store.set(f"{self._prefix}/{self._rank}", pickle.dumps(written))  # type: ignore[arg-type] # bytes do
            self._store.add(self._prefix, 1)

    def hand(self, written: list[Written]) -> None:
        """What all have written, by rank, where it is known otherwise."""
        self._handed = written

    def end(self) -> None:
        """Wait no longer for others as long as they need."""
        self._ends.set()

    def hear(self) -> list[Written]:
        """On the first rank: what all have written, by rank. Raises RuntimeError where others have ended."""
        last = float("inf")
        while not (written := self._handed or self._told()):
            if self._ends.is_set():
                last = min(last, time.monotonic() + SECONDS_TO_TELL)
            if time.monotonic() > last:
                raise RuntimeError("other ranks have ended before their files were written")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        with suppress(RuntimeError):  # what is handed has been told, too
            for key in (*self._keys, self._prefix):
                self._store.delete_key(key)
        return written

    def _told(self) -> list[Written]:
        """Empty: not all have told."""
        with suppress(RuntimeError):
            if self._store.add(self._prefix, 0) == self._world_size:
                return [pickle.loads(self._store.get(key)) for key in self._keys]
        return []

    @property
    def _keys(self) -> list[str]:
        return [f"{self._prefix}/{rank}" for rank in range(self._world_size)]


class Saving:
    """A thread of this rank that writes its part of one checkpoint."""

    def __init__(
        self,
        writer: ShardWriter,
        exchange: Exchange,
        folder: Path,
        finish: Callable[[list[Written]], list[str]] | None,
        start: float,
        is_beside: bool,
    ):
        """folder: the checkpoint's. finish: on the first rank, makes a checkpoint of what all have written and returns
        what there is to say. start: when training stopped for it, by time.monotonic. is_beside: whether training goes
        on meanwhile."""
        self.outcome: Saved | list[str] | None = None
        """On the first rank: what has become of it, saved or problems; None before its end."""
        self._writer = writer
        self._exchange = exchange
        self._folder = folder
        self._finish = finish
        self._start = start
        self._stopped = time.monotonic() - start if is_beside else None
        self._written = Written()
        self._is_written = Event()
        self._thread = Thread(target=self._run, daemon=True, name="saving")
        self._thread.start()

    def written(self) -> Written:
        """Wait until this rank has written its part."""
        self._is_written.wait()
        return self._written

    def join(self, written: list[Written]) -> None:
        """Wait for the end. written: what all have, by rank."""
        self._exchange.hand(written)
        self._thread.join()

    def close(self) -> None:
        """Wait for the end where others may have ended."""
        self._exchange.end()
        self._thread.join()

    def _run(self) -> None:
        self._written = self._writer.write()
        self._exchange.tell(self._written)
        self._is_written.set()
        if self._finish is None:
            return
        try:
            remarks = self._finish(self._exchange.hear())
        except UserError as error:
            self.outcome = error.problems
        except Exception as error:  # ends the save, and not the thread without a word
            self.outcome = [f"{unwritten(self._folder)}: {error}"]
        else:
            seconds = time.monotonic() - self._start
            self.outcome = Saved(self._folder, seconds, seconds if self._stopped is None else self._stopped, remarks)
