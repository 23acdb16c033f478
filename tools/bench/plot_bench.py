"""Draw what tools/bench/bench_fused.py measured."""

import csv
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from tools.bench.picture import draw


def main(input: str, output: str) -> None:
    """Draw the percent of the ceiling (copy bandwidth or matrix rate) of every operator, size and contestant.

    Args:
        input: CSV file of tools/bench/bench_fused.py
        output: picture to write: .png, .svg or .pdf
    """
    with Path(input).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("status") == "ok" and row.get("forward_percent")]
    if not rows:
        raise UserError(f"--input {input}: no rows with figures; give the CSV file of tools/bench/bench_fused.py")
    draw(rows, Path(output))
    print(f"made {output}: {len(rows)} rows of {rows[0]['device']}")


if __name__ == "__main__":
    run_tool(main)
