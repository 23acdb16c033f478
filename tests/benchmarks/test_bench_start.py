"""The benchmark of a rank's start runs, and its parts and the rest are the whole."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.bench_start import PARTS, main, rows
from metro_megatron.cli.command_line import call_with_options


def test_parts_and_rest_are_the_whole_and_ratios_are_of_one_round() -> None:
    one = {"libraries": (2.0, 1.0), "rank": (6.0, 4.0), **dict.fromkeys(PARTS, (0.5, 0.25))}
    three = {name: (3 * wall, 3 * used) for name, (wall, used) in one.items()}
    found = {row["what"]: row for row in rows([one, three])}
    assert (found["rank"]["ratio"], found["rank"]["cpu_ratio"], found["rank"]["seconds"]) == (3.0, 4.0, 12.0)
    assert (found["rest"]["seconds"], found["rest"]["cpu_seconds"]) == (4.0, 4.0)  # 6 - 8 / 2 and 4 - 8 / 4, twice


@pytest.mark.long
def test_a_trial(tmp_path: Path) -> None:
    call_with_options(main, ["--rounds", "1", "--output", str(tmp_path / "start")])
    with (tmp_path / "start.csv").open() as file:
        seconds = {row["what"]: float(row["cpu_seconds"]) for row in csv.DictReader(file)}
    assert list(seconds) == ["libraries", "rank", *PARTS, "rest"]
    assert all(seconds[part] > 0 for part in PARTS) and seconds["rank"] > seconds["megatron-core"]
