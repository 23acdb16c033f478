"""What happened to a run on its way: RUN/journal.jsonl, a line with date and step for each option that changed, and for
each step that was skipped as a spike."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

JOURNAL = "journal.jsonl"


def note(run: Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Note that from behind `step` on options, by name, are as the second value says."""
    _write(run, [{"step": step, "option": name, "was": was, "now": now} for name, (was, now) in changes.items()])


def note_spike(run: Path, step: int, norm: float) -> None:
    """Note that a step, counted from 1, was skipped for its gradient norm."""
    _write(run, [{"step": step, "skipped_for_norm": norm}])


def _write(run: Path, lines: list[dict[str, Any]]) -> None:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with (run / JOURNAL).open("ab") as file:
        for line in lines:
            file.write(orjson.dumps({"date": date, **line}) + b"\n")
