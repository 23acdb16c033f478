"""A run whose ranks wait for one that does nothing ends, and says which one that is and where each rank stood."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from torch.distributed import Store

CHECKS = 20
"""Looks within the time that a rank may be still."""
EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""


class Watchdog:
    """A thread beside the loop, which tells it what it is about to do.

    Ranks learn of each other through the store that joined them: no collective, which would wait with the others. A
    process that has stopped whole no longer counts its looks; else the rank whose last sign is the oldest is the one
    that the others wait for.
    """

    def __init__(self, store: Store, rank: int, world_size: int, seconds: float, folder: Path):
        """seconds: how long a rank may be still. folder: where each rank writes its stacks in the end."""
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._seconds = seconds
        self._folder = folder
        self._last = (time.monotonic(), time.time(), "to train", seconds)
        """When this rank last gave a sign, by a clock that nobody sets and by the one that people read."""
        self._looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def sign(self, doing: str, usual: float = 0.0) -> None:
        """Of life: what this rank begins to do, and the seconds that it usually takes, if they are known."""
        self._last = (time.monotonic(), time.time(), doing, max(self._seconds, 2 * usual))

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        self._tell()
        while not self._ended.wait(self._seconds / CHECKS):
            self._looks += 1
            self._tell()
            since, _, _, limit = self._last
            if time.monotonic() - since > limit:
                self._end()

    def _tell(self) -> None:
        _, since, doing, _ = self._last
        with suppress(RuntimeError):  # the store has ended with torchrun
            self._store.set(
                _key(self._rank), json.dumps([self._looks, since, doing, socket.gethostname(), os.getpid()])
            )

    def _end(self) -> None:
        """Write this process's stacks, say who was still first, and end the process."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        with suppress(RuntimeError, OSError):
            print(f"error: {self._verdict()}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the loop waits in a collective, which no exception reaches

    def _verdict(self) -> str:
        ranks = [rank for rank in range(self._world_size) if self._store.check([_key(rank)])]
        signs = {rank: json.loads(self._store.get(_key(rank))) for rank in ranks}
        stopped = [rank for rank, (looks, *_) in signs.items() if looks < self._looks - CHECKS / 2]
        first = min(stopped or signs, key=lambda rank: signs[rank][1])
        _, since, doing, host, process = signs[first]
        clock = datetime.fromtimestamp(since).astimezone().isoformat(" ", "seconds")
        return (
            f"rank {self._rank} has waited for {self._seconds:.0f} s (parallel.timeout_minutes): rank {first}, process "
            f"{process} on {host}, has done nothing since {clock}, when it began {doing}; where the other ranks "
            f"stand is in {self._folder}. Look at that machine, then run the same command again"
        )


def _key(rank: int) -> str:
    return f"metro_megatron/sign/{rank}"
