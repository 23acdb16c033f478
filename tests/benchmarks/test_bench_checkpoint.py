"""The benchmark of saves and loads runs, and compares what it says that it compares."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.bench_checkpoint import BESIDE, _rows, main
from metro_megatron.cli.command_line import call_with_options


def test_ratios_are_of_rates_in_one_round() -> None:
    one = dict.fromkeys(BESIDE, (1.0, 0.5)) | {"save": (2.0, 1.0), "stopped": (0.5, 0.2), "load": (5.0, 3.0)}
    three = {name: (3 * wall, 3 * used) for name, (wall, used) in one.items()}
    rows = {row["what"]: row for row in _rows([one, three], 8_000_000_000)}
    assert {name: row["ratio"] for name, row in rows.items() if row["ratio"] != 1.0} == {
        "save": 0.5,
        "stopped": 2.0,
        "load": 0.2,
    }
    assert rows["save"]["gb_per_s"] == 2.0 and rows["save"]["seconds"] == 4.0 and rows["save"]["cpu_seconds"] == 2.0


@pytest.mark.long
def test_a_trial(tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    call_with_options(main, ["--size", "demo", "--rounds", "2", "--folder", str(tmp_path), "--output", str(output)])
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == list(BESIDE) and all(float(row["seconds"]) > 0 for row in rows)
