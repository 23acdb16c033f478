"""What a run was told anew on its way: RUN/journal.jsonl, a line for each option that changed, with date and step."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

JOURNAL = "journal.jsonl"


def note(run: Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Note that from behind `step` on options, by name, are as the second value says."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with (run / JOURNAL).open("ab") as file:
        for name, (was, now) in changes.items():
            file.write(orjson.dumps({"date": date, "step": step, "option": name, "was": was, "now": now}) + b"\n")
