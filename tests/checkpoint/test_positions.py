"""Where steps begin, from what a run has left: the nearest place before them, and none of a past it has abandoned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.checkpoint.files import TRACKER, checkpoint_sha256, iteration_folder
from metro_megatron.checkpoint.positions import known_position
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config

CONFIG = Config(train=replace(Config().train, train_steps=40))


def save(run: Path, step: int, position: int, suffix: str = "", **more: Any) -> Path:
    folder = iteration_folder(run, step)
    folder = folder.with_name(folder.name + suffix)
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"step": step, "consumed_samples": position, **more}))
    (folder / "integrity.json").write_text(f"{folder}")
    return folder


def log(run: Path, **positions: int) -> None:
    lines = [{"step": int(step[1:]), "consumed_samples": position} for step, position in positions.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def branch_of(point: Path, **train: Any) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, branch_from=str(point), **train))


def test_a_past_that_the_run_has_gone_back_from_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 3, 30)
    save(tmp_path, 6, 60)
    save(tmp_path, 9, 999, ".set_aside")
    save(tmp_path, 10, 999, ".unfinished")
    save(tmp_path, 12, 999)
    (tmp_path / TRACKER).write_text("6\n")
    assert known_position(tmp_path, CONFIG, 15) == (6, 60) and known_position(tmp_path, CONFIG, 5) == (3, 30)
    (tmp_path / TRACKER).unlink()
    assert known_position(tmp_path, CONFIG, 15) == (12, 999), "as the run that is started again takes it"
    log(tmp_path, s7=70, s12=120)
    assert known_position(tmp_path, CONFIG, 15) == (12, 120), "what is logged is of this past"
    assert known_position(tmp_path, CONFIG, 11) == (7, 70)
    assert known_position(tmp_path / "none", CONFIG, 15) == (0, 0)


def test_beginnings_of_phases_are_places(tmp_path: Path) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, phases=[Phase(10, mask_probability=0.3), Phase("50%")]))
    save(tmp_path, 30, 300, phase_begins=[0, 100, 200])
    assert [known_position(tmp_path, config, step) for step in (9, 19, 29, 30)] == [
        (0, 0), (10, 100), (20, 200), (30, 300),
    ]  # fmt: skip
    longer = replace(config, train=replace(config.train, train_steps=80))
    assert known_position(tmp_path, longer, 35) == (0, 0), "made when the phase began at 20"


def test_a_branch_is_counted_from_where_it_begins(tmp_path: Path) -> None:
    point, run = save(tmp_path / "parent", 20, 200), tmp_path / "run"
    config = branch_of(point)
    log_of_the_parent = tmp_path / "parent"
    log(log_of_the_parent, s19=999)
    assert known_position(run, config, 25) == (20, 200), "nothing is saved yet"
    assert known_position(run, config, 19) == (0, 0)
    earlier = {"step": 20, "checkpoint": checkpoint_sha256(point)}
    saved = save(run, 30, 300, branch=earlier)
    assert known_position(run, config, 25) == (20, 200), "as earlier releases wrote it"
    (point / "integrity.json").write_text("another checkpoint has this name now")
    assert known_position(run, config, 25) == (0, 0)
    told = {"step": 30, "consumed_samples": 300, "branch": {**earlier, "consumed_samples": 201}}
    (saved / "progress.json").write_text(json.dumps(told))
    assert known_position(run, config, 25) == (20, 201), "whatever has become of the parent"
    # A branch of that branch, whose point says where that one began.
    assert known_position(tmp_path / "next", branch_of(saved), 35) == (30, 300)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": 30}', b'{"step": "x", "consumed_samples": 3}'])
def test_damage_is_passed_by(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 20, 200)
    (save(tmp_path, 30, 300) / "progress.json").write_bytes(content)
    assert known_position(tmp_path, CONFIG, 35) == (20, 200)
    (iteration_folder(tmp_path, 30) / "progress.json").unlink()
    assert known_position(tmp_path, branch_of(tmp_path / "gone"), 35) == (20, 200)
