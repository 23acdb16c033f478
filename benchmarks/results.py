"""Rows of a benchmark as JSON and CSV, saved whole after every row, and as a table."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metro_megatron.files import replace_text

Row = dict[str, Any]


class Results:
    """The rows of one run. `prefix`.json is a list of runs, `prefix`.csv all their rows; no prefix: nothing is written.

    A run begins with `head`: its provenance and what was measured once.
    """

    def __init__(self, prefix: Path | None, head: Mapping[str, Any], columns: Sequence[str], *, append: bool = False):
        self.rows: list[Row] = []
        self._prefix, self._columns = prefix, columns
        self._run: dict[str, Any] = {**head, "rows": self.rows}
        path = prefix and prefix.with_name(prefix.name + ".json")
        earlier = json.loads(path.read_text()) if append and path and path.exists() else []
        self._runs: list[dict[str, Any]] = [*earlier, self._run]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def note(self, **facts: Any) -> None:
        """Put facts beside the rows."""
        self._run |= facts
        self.save()

    def save(self) -> None:
        """Write both files in one piece each."""
        if self._prefix is None:
            return
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._prefix.with_name(self._prefix.name + ".json"), json.dumps(self._runs, indent=1) + "\n")
        flat = [{**_scalars(run), **row} for run in self._runs for row in run["rows"]]
        provenance = [name for name in _scalars(self._run) if name not in self._columns]
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, [*self._columns, *provenance], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(flat)
        replace_text(self._prefix.with_name(self._prefix.name + ".csv"), content.getvalue())


def _scalars(run: Mapping[str, Any]) -> Row:
    return {name: value for name, value in run.items() if not isinstance(value, list | dict)}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text."""
    lines = [list(columns), *([shown(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def shown(value: Any) -> str:
    """A cell of a table: numbers with three digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
