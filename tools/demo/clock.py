"""Where in the whole the demonstration is, and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from tools.demo.journal import Step

SECONDS_OF_PRIOR = 60.0
"""Weight of the belief that this machine is as fast as expected, until stages have shown otherwise."""


@dataclass(frozen=True)
class Stage:
    """Steps that belong together under one title, some at a time."""

    name: str
    title: str
    steps: tuple[Step, ...]
    expected_seconds: float
    """On the machine that the preset is sized for; weighs the stages in the estimate of the time left."""
    at_a_time: int = 1
    threads: int = 1
    """Threads of every process, for OpenMP."""


@dataclass
class Clock:
    """Time passed and time left over all stages."""

    stages: Sequence[Stage]
    started: float = field(default_factory=time.monotonic)
    stage_started: float = 0.0
    number: int = -1
    expected_done: float = 0.0
    """Expected seconds of the stages that were run, not skipped."""
    to_skip: frozenset[str] = frozenset()
    """Names of the stages that have nothing to do, as long as none before them is run."""

    def begin(self, number: int) -> None:
        """The stage with this number starts."""
        self.number = number
        self.stage_started = time.monotonic()

    def end(self, was_run: bool) -> None:
        """The current stage is over."""
        self.expected_done += self.stages[self.number].expected_seconds * was_run
        if was_run:
            self.to_skip = frozenset()

    def line(self, share: float) -> str:
        """Stage k/n, its title, time passed and left when `share` of the stage is done."""
        now = time.monotonic()
        stage = self.stages[self.number]
        in_stage = now - self.stage_started
        before = self.stage_started - self.started
        speed = (before + SECONDS_OF_PRIOR) / (self.expected_done + SECONDS_OF_PRIOR)
        rest_of_stage = in_stage * (1 - share) / share if share > 0.02 else self._expected(stage) * speed - in_stage
        later = sum(map(self._expected, self.stages[self.number + 1 :])) * speed
        left = timedelta(seconds=round(max(0.0, rest_of_stage) + later))
        passed = timedelta(seconds=round(now - self.started))
        return f"[{self.number + 1}/{len(self.stages)}] {stage.title} | {passed} passed, about {left} left"

    def _expected(self, stage: Stage) -> float:
        return 0.0 if stage.name in self.to_skip else stage.expected_seconds
