"""Runs stages: their commands' output is shown and kept, with the place in the whole and the time left."""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import psutil

from metro_megatron.errors import UserError
from tools.demo.clock import Clock, Stage
from tools.demo.journal import Journal, Step

SECONDS_BETWEEN_REPORTS = 30.0
SECONDS_TO_STOP = 120.0
"""How long a command may take to save and end when the demonstration is interrupted."""

_STEP = re.compile(r"\bstep (\d+)/(\d+)\b")


class Runner:
    """Runs what is missing of some stages, in order. Commands run in the journal's directory."""

    def __init__(self, journal: Journal, environment: Mapping[str, str]):
        self.journal = journal
        self.environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}

    def run(self, stages: Sequence[Stage]) -> None:
        """Run every step that has no fitting stamp.

        Raises UserError when a command fails, KeyboardInterrupt on Ctrl-C, SIGTERM or SIGHUP after the commands
        have been asked to save and end; both leave what is needed to continue.
        """
        done = [stage.name for stage in stages if not self._missing(stage)]
        clock = Clock(stages, to_skip=frozenset(done))
        with _signals_interrupt():
            for number, stage in enumerate(stages):
                clock.begin(number)
                clock.end(self._run_stage(stage, clock))

    def _run_stage(self, stage: Stage, clock: Clock) -> bool:
        states = {step.name: self.journal.state(step) for step in stage.steps}
        missing = self._missing(stage)
        print(f"\n{clock.line(0.0)}", flush=True)
        if not missing:
            print("  done before, nothing has changed", flush=True)
            return False
        is_fresh = not any(
            states[step.name] == "done" or (step.resumes and states[step.name] == "started") for step in stage.steps
        )
        start = time.monotonic()
        try:
            _Commands(self.journal, self.environment, stage, missing, clock).run()
        finally:
            if any(states[step.name] != "done" for step in stage.steps):
                self.journal.add_seconds(stage.name, time.monotonic() - start, is_fresh)
        return True

    def _missing(self, stage: Stage) -> list[Step]:
        return [step for step in stage.steps if step.always or self.journal.state(step) != "done"]


class _Commands:
    """The commands of one stage under way; threads hand their lines to this one."""

    def __init__(
        self, journal: Journal, environment: Mapping[str, str], stage: Stage, missing: Sequence[Step], clock: Clock
    ):
        self.journal = journal
        self.environment = environment
        self.stage = stage
        self.clock = clock
        self.waiting = deque(missing)
        self.shares = {step.name: 0.0 if step in missing else 1.0 for step in stage.steps}
        self.running: dict[str, tuple[Step, subprocess.Popen[str]]] = {}
        self.lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self.last_report = time.monotonic()

    def run(self) -> None:
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.stage.at_a_time:
                    self._start(self.waiting.popleft())
                self._follow()
        except BaseException:
            self._stop()
            raise

    def _start(self, step: Step) -> None:
        self.journal.start(step)
        print(f"$ {shlex.join(step.command)}", flush=True)
        process = subprocess.Popen(
            step.command,
            cwd=self.journal.directory,
            env={**self.environment, "OMP_NUM_THREADS": str(self.stage.threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process, which asks the command to save and end
        )
        assert process.stdout is not None
        self.running[step.name] = (step, process)
        threading.Thread(target=self._read, args=(step, process.stdout), daemon=True).start()

    def _read(self, step: Step, output: IO[str]) -> None:
        with output, self.journal.log(step).open("w", encoding="utf-8") as log:
            for line in output:
                log.write(line)
                log.flush()
                self.lines.put((step.name, line.rstrip("\n")))
        self.lines.put((step.name, None))

    def _follow(self) -> None:
        """Show one line, or note that a command has ended, or wait a little; report now and then."""
        try:
            name, line = self.lines.get(timeout=1.0)
        except queue.Empty:
            pass
        else:
            if line is None:
                self._end(name)
            else:
                self._show(name, line)
        if time.monotonic() - self.last_report > SECONDS_BETWEEN_REPORTS:
            self.last_report = time.monotonic()
            print(self.clock.line(sum(self.shares.values()) / len(self.shares)), flush=True)

    def _show(self, name: str, line: str) -> None:
        found = _STEP.search(line)
        if found:
            self.shares[name] = int(found.group(1)) / max(1, int(found.group(2)))
        label = f"{name}: " if self.stage.at_a_time > 1 else ""
        print(f"  {label}{line}".rstrip(), flush=True)

    def _end(self, name: str) -> None:
        step, process = self.running[name]
        code = process.wait()
        del self.running[name]
        if code:
            self._fail(step, code)
        self.journal.finish(step)
        self.shares[name] = 1.0

    def _fail(self, step: Step, code: int) -> NoReturn:
        lines = self.journal.log(step).read_text(encoding="utf-8", errors="replace").splitlines()
        errors = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
        raise UserError(
            [
                *(line.removeprefix("error: ") for line in errors),
                f"{step.name} failed with exit code {code}; its output is in {_short(self.journal.log(step))}. "
                "The same command continues from here",
            ]
        )

    def _stop(self) -> None:
        """Ask all commands to save and end; make them, if it takes too long or Ctrl-C comes again."""
        if not self.running:
            return
        print("\nstopping: what is under way saves its state (Ctrl-C again: at once)", flush=True)
        processes = [process for _, process in self.running.values()]
        family = [one for process in processes for one in _family(process.pid)]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        try:
            psutil.wait_procs(family, SECONDS_TO_STOP)
        except KeyboardInterrupt:
            print("stopping at once", flush=True)
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for process in processes:
            process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that come from it; torchrun's workers are not in its group."""
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _short(path: Path) -> Path:
    """Relative to the current folder, if it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
