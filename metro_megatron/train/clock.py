"""How long steps take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Batch = TypeVar("Batch")


class Clock:
    """Seconds of training between log lines, and how many of them waited for data; the longest step."""

    def __init__(self) -> None:
        self.steps = 0
        self.started = time.monotonic()
        self.waited = 0.0
        self.longest_step = 0.0
        """Seconds; 0 until a step is done."""
        self._began: float | None = None
        """The step under way, by time.monotonic."""

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent on getting each counted."""
        while True:
            start = time.monotonic()
            if self._began is not None:
                self.longest_step = max(self.longest_step, start - self._began)
            self._began = start
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            self.steps += 1
            yield batch

    def pause(self, action: Callable[[], Any]) -> None:
        """Do something that is not training."""
        start = time.monotonic()
        action()
        seconds = time.monotonic() - start
        self.started += seconds
        if self._began is not None:
            self._began += seconds

    def lap(self) -> tuple[float, float, int]:
        """(seconds, seconds waited for data, steps) since the last lap."""
        now = time.monotonic()
        result = max(now - self.started, 1e-9), self.waited, self.steps
        self.started, self.waited, self.steps = now, 0.0, 0
        return result
