"""Work in a process of its own, which may crash, hang or lose its GPU without taking the caller along."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE_S = 10.0

Handler = Callable[[Any], Any]


class WorkerFailed(RuntimeError):
    """The process ended or was ended; the next question starts a new one."""


class Worker:
    """Calls setup(*arguments) in a new process, and there the function that it returns, once for every question.

    setup is a top-level function; questions and answers are pickled.
    """

    def __init__(self, setup: Callable[..., Handler], *arguments: Any):
        self._call = (setup, arguments)
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer. Raises WorkerFailed where the process ends, or after `seconds` without an answer."""
        if self._process is None:
            self._start()
        assert self._connection is not None and self._process is not None
        try:
            self._connection.send(question)
            if not self._connection.poll(seconds):
                self._process.kill()  # before close, which would wait for it
                self.close()
                raise WorkerFailed(f"no answer within {seconds:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(PATIENCE_S)
            code = self._process.exitcode
            self.close()
            raise WorkerFailed(f"the process ended with exit code {code}") from error

    def close(self) -> None:
        """End the process, kindly if it listens, and those that it left behind."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        self._process.join(PATIENCE_S)
        self._process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._call), daemon=False)
        self._process.start()
        other.close()


def _serve(connection: Connection, setup: Callable[..., Handler], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    handler = setup(*arguments)
    while True:
        try:
            question = connection.recv()
        except EOFError:  # the caller is gone
            return
        connection.send(handler(question))
