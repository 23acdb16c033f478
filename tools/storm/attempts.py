"""One attempt to train a run to its end, and the fault that meets it."""

from __future__ import annotations

import hashlib
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from metro_megatron.checkpoint.files import iteration_folder, saved_steps, tracked_step
from tools.storm.faults import LAYOUTS, OF_FILES, OF_RANKS, SIGNALS, Fault, Shim, flip_bit, step_clock
from tools.storm.processes import Attempt

STILL = 5.0
"""Seconds that a minute of parallel.timeout_minutes, the least that it can say, is here."""
PAUSE = 0.5
"""Seconds that a rank is stopped for that goes on again."""
LIMIT = 150.0
"""Seconds after which an attempt hangs: far more than it takes, on a busy machine too."""
TRACEBACK = "in pretrain\n"
"""A frame of one that a rank has printed; torchrun prints its own."""
WAITED = "Timed out waiting"
"""In one that a busy machine causes: ranks wait for seconds only."""
_STEP = re.compile(r"^step (\d+)/\d+ \|", re.MULTILINE)
_CONTINUED = re.compile(r"^continuing .* after step (\d+)$", re.MULTILINE)
_SAID = re.compile(r"^(?:error|warning): .*$|^.*is not whole; going back.*$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What an attempt showed."""

    hit: bool
    """Whether the fault came before the end."""
    where: str
    """What it met: a path, of a flipped bit with the SHA-256 of the file then, or the processes."""
    code: int | None
    """Exit code of torchrun, or of the process alone."""
    seconds: float
    began: int
    """Step that it went on from."""
    steps: list[int]
    """Those that it did."""
    said: list[str]
    """Errors and warnings."""
    problems: list[str] = field(default_factory=list)
    """What no fault may do."""


class Disturbed:
    """A run folder, and what trains in it."""

    def __init__(self, run: Path, options: Sequence[str], usual: float):
        """options: of pretrain_metro.py, without the layout's. usual: seconds of a run that nothing disturbs."""
        self.run = run
        self.options = options
        self.usual = usual

    def attempt(self, layout: str, fault: Fault | None, console: Path) -> Outcome:
        """Train to the end; or be disturbed, and go on until told to end, if the fault has not ended it."""
        console.parent.mkdir(parents=True, exist_ok=True)
        mark = console.with_suffix(".mark")
        mark.unlink(missing_ok=True)
        if fault and fault.kind == "flipped bit":
            self._flip(fault.place, mark)
        num_processes, options = LAYOUTS[layout]
        attempt = Attempt([*self.options, *options], num_processes, console, partial(self._prepare, fault, mark))
        hangs = True
        try:
            hangs = not self._go_through(attempt, fault, mark)
        finally:
            attempt.kill(with_stacks=hangs)
        outcome = _read(console.read_text(errors="replace"), mark, attempt)
        if hangs:
            outcome.problems.append(f"hangs: not over after {LIMIT:.0f} s")
        outcome.problems.extend(self._broken_promises(outcome, fault, console))
        return outcome

    def _prepare(self, fault: Fault | None, mark: Path, rank: int) -> None:
        """In the process of a rank, before it begins."""
        if fault is None:
            return
        from metro_megatron.parallel import layout
        from metro_megatron.train import trainer

        layout.LATER *= STILL / 60
        watchdog = trainer.Watchdog
        trainer.Watchdog = lambda store, rank, size, _, still: watchdog(store, rank, size, STILL, still)  # type: ignore
        if fault.injection:
            Shim(self.run, mark).arm(fault.injection)
        if fault.kind == "clock step" and rank == fault.victim:
            step_clock(fault.moment * self.usual, fault.seconds, mark)

    def _flip(self, place: float, mark: Path) -> None:
        """In the newest checkpoint, if another one is whole."""
        steps = saved_steps(self.run)
        if len(steps) > 1:
            path = flip_bit(iteration_folder(self.run, steps[-1]), place)
            mark.write_text(f"{path}\n{hashlib.sha256(path.read_bytes()).hexdigest()}")

    def _go_through(self, attempt: Attempt, fault: Fault | None, mark: Path) -> bool:
        """Strike when it is time, and have the run end; whether it has, within the limit."""
        struck: float | None = None
        told = ranks_since = struck
        while not attempt.is_over():
            time.sleep(0.01)
            now = attempt.seconds
            if now > LIMIT:
                return False
            if fault is None:
                continue
            if ranks_since is None and len(attempt.ranks()) == fault.num_processes:
                ranks_since = now
            if struck is None and fault.kind in SIGNALS:
                since = ranks_since if fault.kind in OF_RANKS else 0.0
                if since is not None and now >= since + fault.moment * self.usual:
                    _strike(attempt, fault, mark)
            if struck is not None and fault.kind == "stop rank" and len(attempt.ranks()) < fault.num_processes:
                _send(signal.SIGCONT, attempt.ranks())  # wakes when the others are gone
            if struck is None and mark.exists():
                struck = now
            may_be_told = fault.kind in (*OF_FILES, "clock step", "flipped bit", "pause rank")
            if struck is not None and told is None and may_be_told and now > struck + fault.rest * self.usual:
                told = now
                attempt.signal(signal.SIGTERM)
        return True

    def _broken_promises(self, outcome: Outcome, fault: Fault | None, console: Path) -> list[str]:
        kind, said, problems = fault.kind if fault else "", console.read_text(errors="replace"), []
        if kind in ("SIGTERM", "SIGHUP") and outcome.steps and tracked_step(self.run) != outcome.steps[-1]:
            problems.append(f"step {outcome.steps[-1]} was done, but {tracked_step(self.run)} saved")
        ends_with_a_line = kind in ("", "ENOSPC", "EIO", "clock step", "flipped bit", "pause rank")
        if ends_with_a_line and TRACEBACK in said and not ("\nerror: " in said or WAITED in said):
            problems.append("a traceback, no line")
        return problems


def _read(said: str, mark: Path, attempt: Attempt) -> Outcome:
    """What a console shows of an attempt."""
    continued = _CONTINUED.search(said)
    return Outcome(
        hit=mark.exists(),
        where=mark.read_text() if mark.exists() else "",
        code=attempt.code,
        seconds=round(attempt.seconds, 2),
        began=int(continued[1]) if continued else 0,
        steps=[int(step) for step in _STEP.findall(said)],
        said=_SAID.findall(said)[-6:],
    )


def _strike(attempt: Attempt, fault: Fault, mark: Path) -> None:
    """Send the fault's signal, if who gets it is there, and mark to whom."""
    processes, ranks = attempt.processes(), attempt.ranks()
    if fault.kind in OF_RANKS:
        targets = ranks[fault.victim :][:1]
    else:
        targets = [one for one in processes if fault.kind == "kill tree" or one.pid == attempt.pid]
    if not targets:
        return
    _send(SIGNALS[fault.kind], targets)
    if fault.kind == "pause rank":
        time.sleep(PAUSE)
        _send(signal.SIGCONT, targets)
    mark.write_text(", ".join(f"process {target.pid}" for target in targets))


def _send(number: int, targets: Sequence[psutil.Process]) -> None:
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(number)
