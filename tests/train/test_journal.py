"""RUN/journal.jsonl keeps what came before and after a line that a crash has cut short."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train.journal import (
    JOURNAL,
    PassedOver,
    note,
    note_beginning,
    note_rollback,
    rolled_back,
    told_between,
    values_before,
)
from metro_megatron.train.replay import _planned


def test_a_line_that_a_crash_has_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    said: list[str] = []
    note_rollback(tmp_path, range(7, 9), "bad", said.append)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"date": "2026-01')
    note_rollback(tmp_path, range(9, 12), "bad", said.append)
    note_rollback(tmp_path, range(9, 15), "bad", said.append)
    assert rolled_back(tmp_path) == [range(7, 9), range(9, 12), range(9, 15)] and said == []


def test_what_a_run_was_told_in_a_past_that_it_has_gone_back_from_does_not_count(tmp_path: Path) -> None:
    note(tmp_path, 3, {"optimizer.lr": (1, 2), "train.train_steps": (9, 12)}, print)
    note(tmp_path, 9, {"optimizer.lr": (2, 3)}, print)
    note(tmp_path, 6, {"optimizer.lr": (2, 4)}, print)
    note(tmp_path, 8, {"optimizer.lr": (4, 5)}, print)
    assert values_before(tmp_path, 3, 20) == {"optimizer.lr": 1, "train.train_steps": 9}
    assert values_before(tmp_path, 4, 20) == values_before(tmp_path, 6, 7) == {"optimizer.lr": 2}
    assert values_before(tmp_path, 7, 20) == {"optimizer.lr": 4} and values_before(tmp_path, 9, 20) == {}
    assert told_between(tmp_path, 6, 20) == ["optimizer.lr"] and told_between(tmp_path, 8, 20) == []


def test_what_a_run_was_before_it_began_anew_does_not_count(tmp_path: Path) -> None:
    note_beginning(tmp_path, print)
    assert not (tmp_path / JOURNAL).exists(), "nothing to be told apart from"
    note(tmp_path, 3, {"optimizer.lr": (1, 2)}, print)
    note_rollback(tmp_path, range(2, 4), "a spike", print)
    note_beginning(tmp_path, print)
    assert rolled_back(tmp_path) == [] and told_between(tmp_path, 0, 9) == [] and values_before(tmp_path, 0, 9) == {}
    note_rollback(tmp_path, range(5, 6), "a spike", print)
    note(tmp_path, 7, {"optimizer.lr": (1, 3)}, print)
    assert rolled_back(tmp_path) == [range(5, 6)] and values_before(tmp_path, 0, 9) == {"optimizer.lr": 1}
    assert "rolled_back_to" in (tmp_path / JOURNAL).read_text().splitlines()[1], "nothing is lost"


def test_steps_that_are_passed_over_say_why_whether_by_plan_or_undone_and_before_a_branch_point(tmp_path: Path) -> None:
    config = replace(Config(), train=replace(Config().train, skip_steps=["6-8"]))
    note_rollback(tmp_path, range(2, 4), "a spike", print)
    skipped, undone = "train.skip_steps 6-8", "the run went back from it (journal.jsonl)"
    expected = ["", "", undone, undone, "", skipped, skipped, skipped, ""]
    assert [PassedOver(tmp_path, config).why(step) for step in range(1, 10)] == expected
    assert [PassedOver(None, config).why(step) for step in (3, 6)] == ["", skipped]
    (point := tmp_path / "iter_0000010").mkdir()
    save_config(config, point / "run_config.yaml")
    (point / "progress.json").write_text(json.dumps({"step": 10, "consumed_samples": 99}))
    branch = replace(config, train=replace(config.train, branch_from=str(point), skip_steps=["6-8", "12"]))
    own = tmp_path / "branch"
    own.mkdir()
    note_rollback(own, range(10, 11), "a spike", print)
    assert [PassedOver(own, branch).why(step) for step in range(1, 11)] == [*expected, ""]
    save_config(branch, own / "run_config.yaml")
    refusals = {10: f"branched from {point}; give --run {tmp_path}$", 11: "went back", 12: "train.skip_steps 12$"}
    for step, refusal in refusals.items():
        with pytest.raises(UserError, match=refusal):
            _planned(own, step)  # what replays a step
    assert PassedOver(own, branch).why(11) == undone and PassedOver(own, branch).why(12) == "train.skip_steps 12"
