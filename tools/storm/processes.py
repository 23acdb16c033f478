"""Processes of a run that are forked from this one, which has the libraries loaded: torchrun with its ranks, or one
process alone. They are what the commands would start, but for seconds of imports."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

PR_SET_CHILD_SUBREAPER = 36
PROGRAM = Path(__file__).parents[2] / "pretrain_metro.py"
STACKS = signal.SIGUSR1
"""Has a process write where its threads stand."""
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""Those that torchrun hears."""
Prepare = Callable[[int], None]
"""What a rank does before anything else."""


def load() -> None:
    """Load once what each process of a run would."""
    from metro_megatron.train.launch import import_megatron

    import_megatron()
    import torch.distributed.run  # noqa: F401

    import metro_megatron.train.trainer  # noqa: F401

    gc.collect()
    gc.freeze()  # megatron-core calls the collector around every checkpoint: what is here already is no garbage


def adopt_orphans() -> None:
    """Become the parent of processes whose own is gone, so that none is missed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def in_fork(action: Callable[[], object]) -> None:
    """Do something in a process of its own: threads that it starts would be missing in all that is forked later.

    Raises RuntimeError where it fails.
    """
    pid = os.fork()
    if pid == 0:
        _end(action)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise RuntimeError(f"exit code {code} of a process; its message is above")


class Attempt:
    """A run from its start until none of its processes is left."""

    def __init__(self, options: Sequence[str], num_processes: int, console: Path, prepare: Prepare):
        """options: of pretrain_metro.py. More than one process are started by torchrun. console: gets what they say."""
        self.started = time.monotonic()
        self.code: int | None = None
        """Of torchrun, or of the one process; None as long as it lives."""
        self.num_ranks = num_processes
        self.pid = os.fork()
        if self.pid == 0:
            with console.open("wb") as file:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
            words = [str(PROGRAM), *options]
            if num_processes == 1:
                _become(words, dict(os.environ), prepare)
            _end(lambda: _torchrun(num_processes, words, prepare))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def processes(self) -> list[psutil.Process]:
        """All that live, the first one before those that it started."""
        return sorted(psutil.Process().children(recursive=True), key=lambda process: process.pid)

    def ranks(self) -> list[psutil.Process]:
        """By rank; fewer while they are being started, or have ended."""
        return [one for one in self.processes() if self.num_ranks == 1 or one.pid != self.pid]

    def signal(self, number: int) -> None:
        """Send a signal to torchrun, or to the one process."""
        if self.code is None:
            os.kill(self.pid, number)

    def is_over(self) -> bool:
        """Whether no process is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid:
                self.code = os.waitstatus_to_exitcode(status)

    def kill(self, with_stacks: bool = False) -> None:
        """End all processes, and wait for that."""
        for process in self.processes() if with_stacks else ():
            process.send_signal(signal.SIGCONT)
            process.send_signal(STACKS)
            time.sleep(1.0)  # one after the other: they write into one file
        while not self.is_over():
            for process in self.processes():
                process.kill()
            time.sleep(0.01)


def _torchrun(num_processes: int, words: Sequence[str], prepare: Prepare) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    class Forked(subprocess.Popen):  # type: ignore[type-arg]
        def _execute_child(self, args: Any, *others: Any) -> None:
            with signals_wait():
                self.pid = os.fork()
                if self.pid == 0:
                    env = others[5]
                    _become(list(map(str, args)), env, prepare)
            self._child_created = True

    faulthandler.register(STACKS, all_threads=True)
    subprocess_handler.Popen = Forked  # type: ignore[misc]
    patience = ("--shutdown-timeout", "20")
    run.main(["--standalone", "--nproc-per-node", str(num_processes), *patience, "--no-python", *words])


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals are heard in the end, as they are when a process is made in C: what torchrun raises when it hears one is
    lost in Python's own functions around a fork, and the lock of logging that these have taken with it."""
    heard: list[int] = []
    handlers = {ending: signal.signal(ending, lambda number, _: heard.append(number)) for ending in ENDING}
    try:
        yield
    finally:
        for ending, handler in handlers.items():
            signal.signal(ending, handler)
    for number in heard:
        signal.raise_signal(number)


def _become(words: list[str], env: Mapping[str, str], prepare: Prepare) -> NoReturn:
    """Be the program, as if it had been executed here."""
    os.setsid()
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(env)
    faulthandler.register(STACKS, all_threads=True)
    sys.argv = words

    def act() -> None:
        prepare(int(env.get("RANK", 0)))
        runpy.run_path(words[0], run_name="__main__")

    _end(act)


def _end(action: Callable[[], object]) -> NoReturn:
    """Do something and end this process as Python would."""
    code = 1
    try:
        action()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
