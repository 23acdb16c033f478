"""A run whose ranks wait for one that does nothing ends, and says which one that is and where each rank stood."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.distributed import Store

from metro_megatron.config.schema import Config
from metro_megatron.parallel.layout import meet

CHECKS = 20
"""Looks within the time that a rank may be still."""
EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
_VERDICT = "metro_megatron/verdict"


@contextmanager
def watched(config: Config) -> Iterator[Watchdog | None]:
    """From before the ranks of torchrun meet; None for a process that waits for no other."""
    world_size, minutes = int(os.environ.get("WORLD_SIZE", "1")), config.parallel.timeout_minutes
    if world_size == 1:
        yield None
        return
    folder = Path(config.train.output) / "still"
    watchdog = Watchdog(meet(minutes), int(os.environ["RANK"]), world_size, 60.0 * minutes, folder)
    try:
        yield watchdog
    finally:
        watchdog.close()


class Watchdog:
    """A thread beside the run, which tells it what it is about to do.

    Ranks learn of each other through the store in which they meet: no collective, which would wait with the others. A
    process that has stopped whole no longer counts its looks; else the rank whose last sign is the oldest is the one
    that the others wait for. The first to find one decides for all.
    """

    def __init__(self, store: Store, rank: int, world_size: int, seconds: float, folder: Path):
        """seconds: how long a rank may be still. folder: where each rank writes its stacks in the end."""
        self.store = store
        self._rank = rank
        self._world_size = world_size
        self._seconds = seconds
        self._folder = folder
        self._looks = 0
        self._halfway: dict[int, Any] | None = None
        """Signs of all when this rank had been still for half of the time."""
        self._ended = threading.Event()
        self._wakes = threading.Event()
        self._last = (0.0, 0.0, "", 0.0)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.sign("to meet the others")
        self._thread.start()

    def sign(self, doing: str, usual: float = 0.0) -> None:
        """Of life: what this rank begins to do, and the seconds that it usually takes, if they are known."""
        before = self._last[2]
        # By a clock that nobody sets and by the one that people read.
        self._last = (time.monotonic(), time.time(), doing, max(self._seconds, 2 * usual))
        if _kind(doing) != _kind(before):  # not each step: a process that stops now could tell no more
            self._wakes.set()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._wakes.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            with suppress(RuntimeError):  # the store has ended with torchrun
                self._look()
            since, _, _, limit = self._last
            if time.monotonic() - since > limit:
                self._end(self._decide())
            self._wakes.wait(self._seconds / CHECKS)
            self._wakes.clear()
            if self._ended.is_set():
                return

    def _look(self) -> None:
        since, clock, doing, limit = self._last
        self._looks += 1
        sign = [self._looks, clock, doing, socket.gethostname(), os.getpid()]
        self.store.set(_key(self._rank), json.dumps(sign))
        if self.store.check([_VERDICT]):
            # The line is another rank's; a machine that has not said it does.
            self._end(self.store.get(_VERDICT).decode() if os.environ.get("LOCAL_RANK") == "0" else "")
        if time.monotonic() - since < limit / 2:
            self._halfway = None
        elif self._halfway is None:
            self._halfway = self._signs()

    def _signs(self) -> dict[int, Any]:
        there = [rank for rank in range(self._world_size) if self.store.check([_key(rank)])]
        return {rank: json.loads(self.store.get(_key(rank))) for rank in there}

    def _decide(self) -> str:
        """The line that ends the run, of whoever was first to come to one; none without the store."""
        with suppress(RuntimeError):
            return self.store.compare_set(_VERDICT, "", self._verdict()).decode()
        return ""

    def _end(self, line: str) -> None:
        """Write this process's stacks, say the line, and end the process."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        if line:
            with suppress(OSError):
                print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the run waits in a collective, which no exception reaches

    def _verdict(self) -> str:
        signs, before = self._signs(), self._halfway or {}
        absent = [rank for rank in range(self._world_size) if rank not in signs]
        if absent:
            more = f" and {len(absent) - 8:,} more" if len(absent) > 8 else ""
            which = f"ranks {', '.join(map(str, absent[:8]))}{more}" if len(absent) > 1 else f"rank {absent[0]}"
            what = f"{which} did not come to where all ranks meet: not started, or still before that"
        else:
            # Of some ten looks since then. Those of ranks that have ended count no further either: but these decided.
            stopped = [rank for rank, (looks, *_) in before.items() if signs[rank][0] - looks < CHECKS / 4]
            first = min(stopped or signs, key=lambda rank: signs[rank][1])
            _, since, doing, host, process = signs[first]
            clock = datetime.fromtimestamp(since).astimezone().isoformat(" ", "seconds")
            what = f"rank {first}, process {process} on {host}, has done nothing since {clock}, when it began {doing}"
        return (
            f"rank {self._rank} has waited for {self._seconds:.0f} s (parallel.timeout_minutes): {what}; where the "
            f"other ranks stand is in {self._folder}. Look at that machine, then run the same command again"
        )


def _kind(doing: str) -> str:
    return re.sub(r"\d+", "", doing)


def _key(rank: int) -> str:
    return f"metro_megatron/sign/{rank}"
