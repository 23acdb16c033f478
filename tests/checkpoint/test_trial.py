"""What storage refuses of a save is said before the first step, on every rank."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from metro_megatron.checkpoint import trial
from metro_megatron.checkpoint.files import TRIAL
from metro_megatron.checkpoint.trial import try_saving
from metro_megatron.config.schema import ParallelConfig
from metro_megatron.errors import UserError
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks

REFUSED = {
    "mkdir": (Path, "mkdir", 0),
    "fsync": (os, "fsync", 1),
    "rename": (os, "replace", 0),
    "remove": (shutil, "rmtree", 0),
    "read": (trial, "content_of", 1),
}
"""The call, and the rank to which it is refused."""


def problems_on_storage(run: Path) -> dict[str, list[str]]:
    """On every rank: what is said where a call is refused to one of them, by call; and where none is."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    said: dict[str, list[str]] = {}
    for name, (owner, call, rank) in REFUSED.items():
        plain = getattr(owner, call)

        def refused(*arguments: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            if name == "read":
                return plain(*arguments)[:-1] + b"0"
            if options.get("ignore_errors"):  # clearing away is no part of a save
                return plain(*arguments, **options)
            raise OSError(5, "Input/output error")

        with patch.object(owner, call, refused if layout.rank == rank else plain):
            said[name] = _said(run, layout)
    with patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=15)):
        said["room"] = _said(run, layout)
    said["none"] = _said(run, layout)
    layout.destroy()
    return said


def _said(run: Path, layout: Layout) -> list[str]:
    try:
        try_saving(run, 1, layout)
    except UserError as error:
        return error.problems
    return []


def test_storage_that_refuses_a_part_of_a_save_is_named_on_every_rank_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / f"{TRIAL}.unfinished").mkdir()  # of a start that was killed
    of_ranks = run_ranks(problems_on_storage, 2, tmp_path)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0].pop("none") == []
    assert "a checkpoint needs about" in of_ranks[0].pop("room")[0]
    for name, said in of_ranks[0].items():
        (problem,) = said
        assert f"(rank {REFUSED[name][2]} on " in problem and f"nothing could be saved in {tmp_path}" in problem, name
        assert ("is not read as it was written" if name == "read" else "Input/output error") in problem
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_saved_ends_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metro_megatron.train import launch

    called: list[str] = []

    class Started:
        def __init__(self, *arguments: Any) -> None:
            self.checkpoints = self
            self.layout = None

        def __getattr__(self, name: str) -> Any:
            return lambda: called.append(name)

        def check_folder(self) -> None:
            raise UserError("refused")

    monkeypatch.setattr("metro_megatron.train.trainer.Trainer", Started)
    from tests.parity.small_run import small_config

    with pytest.raises(UserError, match="refused"):
        launch._train(small_config(train={"output": str(tmp_path)}), None, "cpu")  # type: ignore[arg-type]
    assert called == ["close"]
