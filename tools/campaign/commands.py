"""Commands of runs that go on beside each other, and end together."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Protocol

from metro_megatron.errors import UserError


class Call(Protocol):
    """Runs commands."""

    def __call__(self, command: Sequence[str], log: Path | None = None) -> None:
        """Run one, and return when it has ended well; what it prints is appended to the log, if there is one.

        Raises UserError where it fails, or where commands were told to end.
        """

    def end(self) -> None:
        """Tell commands to end, those that run and those that are still to come."""


class Commands:
    """Commands as processes."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_ended = False

    def __call__(self, command: Sequence[str], log: Path | None = None) -> None:
        with ExitStack() as stack:
            output = None
            if log:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            with self._lock:
                if self._is_ended:
                    raise UserError("ended; run the same command again to continue")
                # A session of its own: Ctrl-C would reach it twice.
                process = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=output)
                self._running.add(process)
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.remove(process)
        if code:
            raise UserError(f"exit code {code} of: {shlex.join(command)}{f' (see {log})' if log else ''}")

    def end(self) -> None:
        """Each is told once, by SIGTERM, at which pretraining saves."""
        with self._lock:
            self._is_ended = True
            for process in self._running:
                process.terminate()
