"""Of processes that torchrun starts together on a machine one says the mistakes, however soon it ends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from metro_megatron.train import processes


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, int], list[str]]:
    """What a rank of an attempt says."""
    monkeypatch.setattr(processes, "SECONDS_FOR_SPEAKER", 0.0)

    def of_rank(rank: int, attempt: int) -> list[str]:
        error_file = tmp_path / f"attempt_{attempt}" / str(rank) / "error.json"
        error_file.parent.mkdir(parents=True)
        monkeypatch.setenv(processes.ERROR_FILE, str(error_file))
        monkeypatch.setenv("RANK", str(rank))
        return processes.speak_or_wait(["wrong", "worse"])

    return of_rank


def test_one_speaks_in_each_attempt(speak: Callable[[int, int], list[str]]) -> None:
    assert speak(0, 0) == ["wrong", "worse"]
    assert speak(1, 0) == speak(2, 0) == []
    assert speak(1, 1) == [f"{socket.gethostname()}, rank 1: {problem}" for problem in ("wrong", "worse")]
    assert speak(0, 1) == []


def test_without_torchruns_folder_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(processes.ERROR_FILE, raising=False)
    assert processes.speak_or_wait(["wrong"]) == ["wrong"]
    for value in ("", str(tmp_path / "gone" / "0" / "error.json")):
        monkeypatch.setenv(processes.ERROR_FILE, value)
        assert processes.speak_or_wait(["wrong"]) == ["wrong"]
