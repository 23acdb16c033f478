"""How a run is asked to save and end."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

STDOUT = 1


class StopRequest:
    """SIGTERM, and SIGHUP (a terminal or a connection that ends), ask a run to save and end; it is said at once.

    Where SIGHUP is ignored, as under nohup, it stays so, but not below torchrun, which hears it nevertheless and ends
    its processes.
    """

    def __init__(self, speaks: bool, expect: Callable[[], float]):
        """speaks: whether this process says so. expect: the most seconds until the run has saved; 0 if not known."""
        self.is_asked = False
        """Of this process."""
        self.is_agreed = False
        """Whether all ranks know that one was asked."""
        self._speaks = speaks
        self._expect = expect
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN or "TORCHELASTIC_RUN_ID" in os.environ:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}

    def restore(self) -> None:
        """Signals mean again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._speaks and not self.is_asked:
            seconds = math.ceil(self._expect())
            within = f", within about {seconds} s" if seconds else ""
            line = f"{signal.Signals(number).name}: saving after this step{within}, then ending\n"
            # Not print: the signal may have come while a line is printed, which cannot be begun twice.
            with suppress(OSError):
                os.write(STDOUT, line.encode())
        self.is_asked = True
