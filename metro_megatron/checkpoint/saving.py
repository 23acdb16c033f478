"""A save that has begun: threads of all ranks write, and the first rank's gives the checkpoint its name.

What they have written ranks tell each other through the store that joined them: no collective, which would meet those
of the training.
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


class Exchange:
    """How the first rank learns what others have written: through the store, without a collective."""

    def __init__(self, store: Store, name: str, rank: int, world_size: int):
        """name: of this save, the same on all ranks."""
        self._store = store
        self._prefix = f"metro_megatron/save/{name}"
        self._rank = rank
        self._world_size = world_size
        self.ends = Event()
        """Set when this process ends, and no longer waits for others as long as they need."""

    def tell(self, written: Written) -> None:
        """On every rank, when its files are on the disk or could not be written."""
        with suppress(RuntimeError):  # the store has ended with the first rank
            self._store.set(f"{self._prefix}/{self._rank}", pickle.dumps(written))
            self._store.add(self._prefix, 1)

    def hear(self) -> list[Written]:
        """On the first rank: what all have written, by rank. Raises RuntimeError where others have ended."""
        last = float("inf")
        while self._store.add(self._prefix, 0) < self._world_size:
            if self.ends.is_set():
                last = min(last, time.monotonic() + SECONDS_TO_TELL)
            if time.monotonic() > last:
                raise RuntimeError("other ranks have ended before their files were written")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        keys = [f"{self._prefix}/{rank}" for rank in range(self._world_size)]
        told = [pickle.loads(self._store.get(key)) for key in keys]
        for key in (*keys, self._prefix):
            self._store.delete_key(key)
        return told


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
        self._thread = Thread(target=self._run, daemon=True, name="saving")
        self._thread.start()

    def join(self, is_end: bool = False) -> None:
        """Wait for this rank's part; on the first rank for all. is_end: others may have ended."""
        if is_end:
            self._exchange.ends.set()
        self._thread.join()

    def _run(self) -> None:
        self._exchange.tell(self._writer.write())
        if self._finish is None:
            return
        try:
            remarks = self._finish(self._exchange.hear())
        except UserError as error:
            self.outcome = error.problems
        except Exception as error:  # ends the save, and not the thread without a word
            self.outcome = [f"checkpoint {self._folder} could not be written: {error}"]
        else:
            seconds = time.monotonic() - self._start
            self.outcome = Saved(self._folder, seconds, seconds if self._stopped is None else self._stopped, remarks)
