"""The storm's journal, a line for each attempt and each run that came to its end, and what is counted in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from metro_megatron.errors import UserError
from metro_megatron.files import replace_text

Row = dict[str, Any]


class Journal:
    """OUTPUT/journal.jsonl: its first line says what the storm is of."""

    def __init__(self, path: Path, about: Row):
        """Go on with the one that is there. Raises UserError if it is of another storm."""
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # cut by what ended the tool
            replace_text(path, b"".join(lines[:-1]).decode())
        rows = [orjson.loads(line) for line in lines if line.endswith(b"\n")]
        if rows and rows[0] != about:
            raise UserError(f"{path} is of the storm {rows[0]}, not {about}; give another --output, or remove that one")
        self.rows = rows[1:]
        if not rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, orjson.dumps(about, option=orjson.OPT_APPEND_NEWLINE).decode())

    def add(self, row: Row) -> None:
        with self.path.open("ab") as file:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self.rows.append(row)

    @property
    def undisturbed_seconds(self) -> float | None:
        return next((row["undisturbed"] for row in self.rows if "undisturbed" in row), None)

    @property
    def attempts(self) -> list[Row]:
        return [row for row in self.rows if "kind" in row]

    @property
    def problems(self) -> list[str]:
        """What no fault may do, of all attempts: those that nothing disturbed, at the storm's end, have no number."""
        return [
            f"attempt {row['attempt']}: {problem}" if "attempt" in row else f"last of {row['series']}: {problem}"
            for row in self.rows
            for problem in row.get("problems", [])
        ]

    @property
    def hits(self) -> int:
        return sum(row["hit"] for row in self.attempts)

    def ended(self, series: str = "") -> list[Row]:
        """Runs that came to their end, of all series or one."""
        return [row for row in self.rows if "differences" in row and series in ("", row["series"])]

    def damaged(self, series: str) -> dict[str, str]:
        """Files that were damaged in the run of a series that is under way, with their SHA-256 then."""
        rows = [row for row in self.rows if row.get("series") == series and ("damaged" in row or "differences" in row)]
        return dict(rows[-1].get("damaged", {})) if rows else {}


@dataclass
class Count:
    """Of one kind of fault."""

    faults: int = 0
    late: int = 0
    """Drawn, but the run was at its end before."""
    lost: int = 0
    """Steps that had to be done again, by the fault that came before."""
    problems: int = 0


def counts(attempts: Iterable[Row]) -> dict[str, Count]:
    """By kind."""
    found: dict[str, Count] = {}
    last: dict[tuple[str, int], Row] = {}
    for row in attempts:
        count = found.setdefault(row["kind"], Count())
        count.faults += row["hit"]
        count.late += not row["hit"]
        count.problems += len(row["problems"])
        run = row["series"], row["run"]
        if row["kind"] == "flipped bit" and row["hit"] and run in last:
            last[run] = {**last[run], "kind": row["kind"]}
        if not row["steps"]:  # ended before it said where it begins
            continue
        if run in last:
            found[last[run]["kind"]].lost += last[run]["steps"][-1] - row["began"]
        last[run] = row
    return dict(sorted(found.items()))


def report(journal: Journal, train_steps: int, about: Sequence[str]) -> str:
    """A page of counts. about: lines on what was disturbed, where and when."""
    attempts, ended, found = journal.attempts, journal.ended(), counts(journal.attempts)
    steps = sum(len(row["steps"]) for row in journal.rows if "steps" in row)
    seconds = sum(row["seconds"] for row in journal.rows if "steps" in row)
    useful = len(ended) * train_steps
    usual = journal.undisturbed_seconds or 0.0
    lines = [
        *("# A storm of faults", "", "What each means is in [reliability.md](../reliability.md).", ""),
        *(f"- {line}" for line in about),
        f"- {journal.hits} faults in {len(attempts)} attempts of {len(ended)} runs, {seconds / 60:.0f} minutes",
        *_verdicts(journal),
        f"- Goodput: {useful} steps of use of {steps} done ({useful / max(steps, 1):.1%}), "
        f"{len(ended) * usual:.0f} s of an undisturbed run's of {seconds:.0f} s ({len(ended) * usual / seconds:.1%})",
        *("", "| Fault | Came | Too late | Steps done again | Promises broken |", "|---|---|---|---|---|"),
        *(
            f"| {kind} | {count.faults} | {count.late} | {count.lost} | {count.problems} |"
            for kind, count in found.items()
        ),
        "",
    ]
    return "\n".join(lines)


def problems(journal: Journal) -> list[str]:
    """Everything that no fault may do."""
    unequal = [f"{row['series']}, run {row['run']}: {one}" for row in journal.ended() for one in row["differences"]]
    return journal.problems + unequal


def _verdicts(journal: Journal) -> list[str]:
    broken, lines = journal.problems, []
    for series in sorted({row["series"] for row in journal.ended()}):
        ended = journal.ended(series)
        equal = sum(not row["differences"] for row in ended)
        how = "bit for bit" if series == "one layout" else "within 1e-6"
        lines.append(f"- {series}: {equal} of {len(ended)} runs equal to the undisturbed one {how}")
    corrupt = sum("corrupt" in problem for problem in broken)
    hangs = sum("hangs" in problem for problem in broken)
    return [*lines, f"- {corrupt} corrupt loads, {hangs} hangs, {len(broken) - corrupt - hangs} other promises broken"]
