"""Draw what benchmarks/bench_fused.py measured."""

import csv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.picture import draw
from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError


@dataclass(frozen=True)
class Options:
    """What to draw."""

    input: str
    """CSV file of benchmarks/bench_fused.py."""
    output: str
    """Picture to write: .png, .svg or .pdf."""


def main(options: Options) -> None:
    """Draw the percent of the ceiling (copy bandwidth or matrix rate) of every operator, size and contestant."""
    with Path(options.input).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("status") == "ok" and row.get("forward_percent")]
    if not rows:
        raise UserError(
            f"--input {options.input}: no rows with figures; give the CSV file of benchmarks/bench_fused.py"
        )
    draw(rows, Path(options.output))
    print(f"made {options.output}: {len(rows)} rows of {rows[0]['device']}")


if __name__ == "__main__":
    run_tool(main)
