"""What is written for people is right, and cannot end a run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metro_megatron.train.report import Report


def test_what_was_not_measured_is_null_and_what_has_no_room_is_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(tmp_path, [], 0, 9)
    path = tmp_path / "metrics.jsonl"
    report.probes(1, {"a": 0.5, "b": float("nan")})
    path.rename(tmp_path / "real")
    path.symlink_to("/dev/full")
    report.probes(2, {"a": 1 / 3, "b": float("inf")})
    path.unlink()
    (tmp_path / "real").rename(path)
    report.probes(3, {"a": 1e-30})
    report.close()
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [
        {"step": 1, "probe/a": 0.5, "probe/b": None},
        {"step": 2, "probe/a": 1 / 3, "probe/b": None},
        {"step": 3, "probe/a": 1e-30},
    ]
    assert f"warning: {path}: No space left on device" in capsys.readouterr().out


def test_a_clock_that_was_set_back_hides_nothing_in_tensorboard(tmp_path: Path) -> None:
    """The resumed part begins behind step 1: what had been written of step 2 is gone, all else is shown."""
    for first, now, values in ((0, 0, {1: 0.1, 2: 0.2}), (1, -7200, {2: 0.3, 3: 0.4}), (3, -9000, {4: 0.5})):
        clock = time.time() + now
        with patch("time.time", return_value=clock):
            report = Report(tmp_path, [], first, 9)
            for step, value in values.items():
                report.probes(step, {"a": value})
            report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("probe/a")
    assert [(event.step, round(event.value, 3)) for event in events] == [(1, 0.1), (2, 0.3), (3, 0.4), (4, 0.5)]


@pytest.mark.parametrize("kind", ["closed pipe", "ascii console"])
def test_a_console_that_cannot_show_a_line_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reading, writing = os.pipe()
    if kind == "closed pipe":
        os.close(reading)
    with open(writing, "w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        report = Report(tmp_path, [], 0, 9)
        for number in range(3):
            report.say(f"caf\u00e9 \u2192 {number}")
        report.close()
    if kind == "ascii console":
        assert os.read(reading, 1 << 16).decode().splitlines() == [f"caf\\xe9 \\u2192 {number}" for number in range(3)]
        os.close(reading)
