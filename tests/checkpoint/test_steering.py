"""A resumed run may be told something else about its further steps: named, noted, and otherwise refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.checkpoint.resume import beginning
from metro_megatron.cli.options import flatten
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train.replay import _planned
from tests.distributed import run_ranks
from tests.parity.small_run import small_config
from tests.train.test_trainer import run

TOLD = {"optimizer.lr": 1e-4, "train.train_steps": 8, "objective.rtd_weight": 20.0}


def config_for(folder: Path, **train: Any) -> Config:
    config = small_config(train={"output": str(folder), "train_steps": 6, "log_interval": 1, **train})
    return replace(
        config,
        optimizer=replace(config.optimizer, auxiliary_lr=3e-3),
        checkpoint=replace(config.checkpoint, save_interval=4),
    )


def told(config: Config, options: dict[str, Any], **train: Any) -> Config:
    for name, value in options.items():
        section, _, leaf = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
    return replace(config, train=replace(config.train, **train))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("finished")
    ((lines, _),) = run_ranks(run, 1, config_for(folder))
    return folder, lines


def test_a_finished_run_goes_on_with_what_is_named_and_its_journal_says_so(
    finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, before = finished
    config = told(config_for(folder), TOLD)
    with pytest.raises(UserError) as caught:
        beginning(config)
    refused = [one for one in caught.value.problems if "train.override may name it" in one]
    assert len(refused) == 3 and refused[0].startswith(
        "objective.rtd_weight is 20.0, but the checkpoint was made with 50"
    )
    ((lines, said),) = run_ranks(run, 1, told(config, {}, override=list(TOLD)))
    assert lines[:6] == before and [line["step"] for line in lines[6:]] == [7, 8]
    for step, line in enumerate(lines[6:], 6):
        assert line["learning_rate"] == pytest.approx(config.optimizer.learning_rate(8).at(step, 8))
        assert line["loss"] == pytest.approx(line["aux_loss"] + 20 * line["rtd_loss"] + line["clm_loss"], rel=1e-12)
    assert "from here on train.train_steps is 8, was 6" in said
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert {line["option"]: (line["was"], line["now"]) for line in journal} == {
        "optimizer.lr": (1e-3, 1e-4),
        "train.train_steps": (6, 8),
        "objective.rtd_weight": (50.0, 20.0),
    }
    assert all(line["step"] == 6 for line in journal)
    # What replays a step has its options, also where the next checkpoint was made with others.
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("iter_0000004", "iter_0000006"))
    for step, of_step in ((5, config_for(folder)), (6, config_for(folder)), (7, config)):
        planned, expected = flatten(_planned(tmp_path / "run", step)), flatten(of_step)
        assert {name: planned[name] for name in TOLD} == {name: expected[name] for name in TOLD}
    assert beginning(told(config, {})) == folder / "iter_0000008", "from its own checkpoints it needs no word"


def test_steps_that_are_passed_over_are_read_by_nobody_and_change_nothing_else(tmp_path: Path) -> None:
    """Without training on them the weights stay: steps behind them do what they would have done as the next ones."""
    config = config_for(tmp_path / "skipping", skip_steps=["3-4"], eval_interval=0)
    ((lines, _),) = run_ranks(run, 1, config)
    assert [line["step"] for line in lines] == [1, 2, 5, 6]
    assert [line["consumed_samples"] for line in lines] == [24, 48, 120, 144]
    ((whole, _),) = run_ranks(run, 1, config_for(tmp_path / "whole", eval_interval=0))
    for line, same in zip(lines[:2], whole[:2], strict=True):
        assert line["aux_loss"] == same["aux_loss"]
    assert lines[2]["aux_loss"] != whole[4]["aux_loss"], "two updates were not made"
    with pytest.raises(UserError, match=r"up to step 6 the checkpoint was made with \['3-4'\]"):
        beginning(told(config, {}, skip_steps=["3-4", "5"]))
    assert beginning(told(config, {"train.train_steps": 9}, skip_steps=["3-4", "8"], override=["train.train_steps"]))


def test_mistakes_in_steering_are_found_at_once() -> None:
    config = told(small_config(), {}, override=["model.hidden_size", "optimizer.lr"], skip_steps=["9-3", "x", "5-9999"])
    found = [one for one in problems(config, 1) if "override" in one or "skip_steps" in one]
    assert len(found) == 4 and "model.hidden_size, which would make another run" in found[0]
    assert "9-3 is no window" in found[1] and "x is no window" in found[2] and "reaches the last" in found[3]


@pytest.mark.parametrize(
    ("before", "after"), [("fp32", "bf16"), pytest.param("fp16", "bf16", marks=pytest.mark.long)], ids=str
)
def test_precision_may_change_at_a_checkpoint(tmp_path: Path, before: str, after: str) -> None:
    """Masters and moments are FP32 in both: the next losses are those of the old format within its rounding."""
    options = {"train.precision": before, "train.train_steps": 8}
    for name in ("whole", "told"):
        run_ranks(run, 1, config_for(tmp_path / name, precision=before))
    ((whole, _),) = run_ranks(run, 1, told(config_for(tmp_path / "whole"), options, override=list(options)))
    options["train.precision"] = after
    ((lines, said),) = run_ranks(run, 1, told(config_for(tmp_path / "told"), options, override=list(options)))
    assert any(one.startswith(f"from here on train.precision is '{after}'") for one in said)
    for line, same in zip(lines[6:], whole[6:], strict=True):
        for name in ("aux_loss", "rtd_loss", "clm_loss"):
            assert line[name] == pytest.approx(same[name], rel=1e-2), name


def test_a_rate_of_the_auxiliary_that_was_main_s_may_stay_when_main_s_changes(tmp_path: Path) -> None:
    """It had no group of its own in the checkpoint."""
    config = told(config_for(tmp_path), {"optimizer.auxiliary_lr": 1e-3})
    run_ranks(run, 1, config)
    options = {"optimizer.lr": 1e-4, "train.train_steps": 7}
    ((lines, _),) = run_ranks(run, 1, told(config, options, override=list(options)))
    assert [line["step"] for line in lines] == list(range(1, 8))
