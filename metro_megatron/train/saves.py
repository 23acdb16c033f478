"""When a run's state is kept: beside the training or while it waits, and what a save that fails means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.checkpoint.saving import Saved
from metro_megatron.config.schema import CheckpointConfig
from metro_megatron.errors import UserError

LONG_WAIT = 1.0
"""Seconds for a save before, of which more are said."""

State = Callable[[], dict[str, Any]]
"""Makes progress.json of a checkpoint. A collective call."""
Say = Callable[[Iterable[str]], object]


class Diverged(UserError):
    """Ranks that should hold the same parameters do not: of this no checkpoint is made."""


class Saves:
    """The saves of one run; every rank makes the same calls, of which only `tell` is not collective."""

    def __init__(self, checkpoints: Checkpoints, options: CheckpointConfig):
        self.checkpoints = checkpoints
        self.options = options
        self.failed = 0
        """Saves in a row that failed."""
        self.longest = 0.0
        """Seconds until one was on the disk."""

    def now(self, step: int, state: State, say: Say) -> None:
        """Save after `step` steps, and wait for it. Raises UserError, on every rank, if it fails."""
        saved = self.checkpoints.save(step, state())
        self.failed = 0
        self._say_saved(saved, say)

    def keep(self, step: int, state: State, say: Say, is_end: bool) -> None:
        """Save after `step` steps, beside the training unless it has ended or the run shall wait.

        What was in its way is said. Raises it as a UserError, on every rank, at the run's end, or if it was there in
        more saves in a row than checkpoint.failed_saves.
        """
        self.end_save_before(say, goes_on=not is_end)
        try:
            if is_end or not self.options.async_save:
                self.now(step, state, say)
            else:
                since = time.monotonic()
                self.checkpoints.begin(step, state(), since)
        except Diverged:
            raise
        except UserError as error:
            if self._failed_too_often() or is_end:
                raise
            say(f"warning: not saved: {problem}" for problem in error.problems)

    def tell(self, say: Say) -> None:
        """Say, on the first rank, what has become of a save beside the training, once."""
        ended = self.checkpoints.ended()
        if isinstance(ended, Saved):
            self._say_saved(ended, say)
        elif ended:
            say(f"warning: not saved: {problem}" for problem in ended)

    def end_save_before(self, say: Say, goes_on: bool) -> None:
        """Wait for the save beside the training, if there is one, and count it. A failure ends the run, as `keep` says,
        if it goes on: it is no reason to leave out the last save, or to go back no more."""
        start = time.monotonic()
        try:
            if saved := self.checkpoints.wait():
                self.failed, self.longest = 0, max(self.longest, saved.seconds)
        except UserError:
            if self._failed_too_often() and goes_on:
                raise
        waited = time.monotonic() - start
        self.tell(say)
        if waited > LONG_WAIT and goes_on:
            say([f"warning: waited {waited:.1f} s for the save before; checkpoint.save_interval is short"])

    def _say_saved(self, saved: Saved, say: Say) -> None:
        say(saved.lines)
        self.longest = max(self.longest, saved.seconds)

    def _failed_too_often(self) -> bool:
        """Count a save that failed."""
        self.failed += 1
        return self.failed > self.options.failed_saves
