"""What happened to a run on its way: RUN/journal.jsonl, a line with date and step for each option that changed, each
step that was skipped as a spike, each that the run went back from, and each time that it began anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from metro_megatron.checkpoint.positions import branch_step
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.files import json_lines

JOURNAL = "journal.jsonl"


def note_beginning(run: Path, say: Callable[[str], object]) -> None:
    """Note, where there is a journal, that the run begins anew: what stands there is of another past."""
    if (run / JOURNAL).exists():
        _write(run, [{"step": 0, "begun": True}], say)


def note(run: Path, step: int, changes: Mapping[str, tuple[Any, Any]], say: Callable[[str], object]) -> None:
    """Note that from behind `step` on options, by name, are as the second value says."""
    _write(run, [{"step": step, "option": name, "was": was, "now": now} for name, (was, now) in changes.items()], say)


def note_spike(run: Path, step: int, norm: float, say: Callable[[str], object]) -> None:
    """Note that a step, counted from 1, was skipped for its gradient norm."""
    _write(run, [{"step": step, "skipped_for_norm": norm}], say)


def note_rollback(run: Path, window: range, cause: str, say: Callable[[str], object]) -> None:
    """Note that the run went back to where `window` of steps, counted from 0, begins, and passes over these from then
    on."""
    _write(run, [{"step": window.stop, "rolled_back_to": window.start, "cause": cause}], say)


def rolled_back(run: Path) -> list[range]:
    """Steps, counted from 0, that the run has gone back from, and passes over."""
    return [range(line["rolled_back_to"], line["step"]) for line in _lines(run, "rolled_back_to", "step")]


@dataclass(frozen=True)
class PassedOver:
    """The steps of a run that are not trained on, or no longer count.

    run: its folder, if it has one yet. Of steps before a branch point the run tells that it branches from, where that
    is still there.
    """

    run: Path | None
    config: Config

    def why(self, step: int) -> str:
        """What a step, counted from 1, is passed over for; empty: it is trained on."""
        for written, window in zip(self.config.train.skip_steps, self.config.skipped_steps, strict=True):
            if step - 1 in window:
                return f"train.skip_steps {written}"
        if step <= self._branch_step:
            return self._parent.why(step)
        is_undone = any(step - 1 in window for window in self._undone)
        return f"the run went back from it ({JOURNAL})" if is_undone else ""

    @cached_property
    def _branch_step(self) -> int:
        return branch_step(self.config)

    @cached_property
    def _parent(self) -> PassedOver:
        point = Path(self.config.train.branch_from)
        return PassedOver(point.parent, load_config(point / "run_config.yaml"))

    @cached_property
    def _undone(self) -> list[range]:
        return [] if self.run is None else rolled_back(self.run)


def told_between(run: Path, first: int, last: int) -> list[str]:
    """Options that the run was told anew behind a step later than `first`, but before `last`."""
    return sorted({line["option"] for line in _told(run) if first < line["step"] < last})


def values_before(run: Path, first: int, last: float) -> dict[str, Any]:
    """Options that the run was told anew behind `first`, or a later step before `last`: as they were before."""
    return {line["option"]: line["was"] for line in reversed(_told(run)) if first <= line["step"] < last}


def _told(run: Path) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for line in _lines(run, "option", "was", "step"):
        # What it was told behind later steps was in a past that it has gone back from.
        told = [*(one for one in told if one["step"] <= line["step"]), line]
    return told


def _lines(run: Path, *names: str) -> list[dict[str, Any]]:
    """Since the run began, those that have all these names."""
    lines = json_lines(run / JOURNAL)
    first = max((number for number, line in enumerate(lines) if "begun" in line), default=0)
    return [line for line in lines[first:] if line.keys() >= set(names)]


def _write(run: Path, lines: list[dict[str, Any]], say: Callable[[str], object]) -> None:
    """`say` hears of what could not be noted, which ends no run."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with (run / JOURNAL).open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash has cut the last line short, which would take the next one with it
                    file.write(b"\n")
            for line in lines:
                file.write(orjson.dumps({"date": date, **line}) + b"\n")
    except OSError as error:
        say(f"warning: {run / JOURNAL}: {error.strerror}; not noted there: {lines}")
