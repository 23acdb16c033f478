"""A run that branches from another's checkpoint: equal to it where nothing differs, and else only in its plan."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from metro_megatron.checkpoint.files import TRACKER, checkpoint_sha256, iteration_folder, tracked_step
from metro_megatron.checkpoint.read import SEGMENTS
from metro_megatron.checkpoint.resume import beginning, rate_jumps
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.train import trainer as trainer_module
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start, whole_weights
from tests.train.test_trainer import run

MEASURED = ("tokens_per_second", "tflops_per_gpu", "seconds_per_step", "data_share")
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
PARENT_DONE = 3


def config_for(output: Path, optimizer: dict[str, Any] | None = None, **train: Any) -> Config:
    """Steps of so many tokens, of which the place in the data does not follow."""
    steps = {"train_steps": 6, "global_batch_size": 0, "global_batch_tokens": 512, "eval_interval": 0}
    return small_config(
        model=DROPOUT,
        optimizer=optimizer or {},
        train={"output": str(output), **steps, **train},
        checkpoint={"save_interval": PARENT_DONE},
    )


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def final_weights(config: Config) -> dict[str, Any]:
    trainer = start(config)
    trainer.restore()
    trainer.homes.fetch_parameters()
    weights = whole_weights(trainer)
    trainer.close()
    return weights


def parent_and_branches(parent: Config, branches: list[Config]) -> tuple[list[Any], list[Any]]:
    """(lines of metrics.jsonl, what was said) and last weights of each."""
    figures = [run(parent)]
    (Path(parent.train.output) / SEGMENTS).write_bytes(b"of an ELECTRA that it began with")
    figures += [run(one) for one in branches]
    return figures, [final_weights(one) for one in (parent, *branches)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("branches")


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[list[Any], list[Any]]:
    """A run, the branch that differs in nothing, and one that decays over its last two steps."""
    branch_from = str(iteration_folder(folder / "parent", PARENT_DONE))
    decay = {"lr_decay_steps": 2, "lr_decay_style": "1-sqrt"}
    ((runs, weights),) = run_ranks(
        parent_and_branches,
        1,
        config_for(folder / "parent"),
        [
            config_for(folder / "same", branch_from=branch_from),
            config_for(folder / "decayed", decay, branch_from=branch_from, train_steps=5),
        ],
    )
    return runs, weights


def test_a_branch_that_differs_in_nothing_is_the_run_itself(folder: Path, trained: Any) -> None:
    (parent, same, other), (weights, equal, decayed) = trained
    assert figures(same[0]) == figures(parent[0])[PARENT_DONE:]
    assert all(tensor.equal(equal[name]) for name, tensor in weights.items())
    assert not all(tensor.equal(decayed[name]) for name, tensor in weights.items())
    point = iteration_folder(folder / "parent", PARENT_DONE)
    assert f"branching from {point} after step {PARENT_DONE}" in same[1]
    assert not any("learning rate is" in one for one in same[1])
    assert any("rate is 0.001 in step 4, the first of the branch, and would be 0.00075" in one for one in other[1])
    progress = json.loads((iteration_folder(folder / "same", 6) / "progress.json").read_text())
    at_point = json.loads((point / "progress.json").read_text())
    assert progress["branch"] == {
        "step": PARENT_DONE,
        "consumed_samples": at_point["consumed_samples"],
        "checkpoint": checkpoint_sha256(point),
    }
    of_parent = json.loads((iteration_folder(folder / "parent", 6) / "progress.json").read_text())
    assert progress["flops"] == of_parent["flops"] > at_point["flops"] > 0
    assert "branch" not in json.loads((point / "progress.json").read_text())
    kept = [(folder / name / SEGMENTS).read_bytes() for name in ("parent", "same")]
    assert kept[0] == kept[1], "without it an export would have other segments"


def test_a_branch_has_rates_of_its_own_from_there_on(folder: Path, trained: Any) -> None:
    decayed, _ = trained[0][2]
    assert [line["step"] for line in decayed] == [4, 5] and tracked_step(folder / "decayed") == 5
    assert [line["learning_rate"] for line in decayed] == [1e-3, pytest.approx(1e-3 * (1 - 0.5**0.5), rel=1e-14)]
    assert decayed[0]["aux_loss"] == trained[0][0][0][PARENT_DONE]["aux_loss"], "it begins with the same weights"


def test_a_branch_is_resumed_from_its_own_checkpoints(folder: Path, trained: Any) -> None:
    """As any run is; and it branches again, under another layout, where it has no checkpoint yet."""
    config = config_for(folder / "same", branch_from=str(iteration_folder(folder / "parent", PARENT_DONE)))
    assert beginning(config) == iteration_folder(folder / "same", 6)
    with pytest.raises(UserError, match="train.branch_from is ''"):
        beginning(replace(config, train=replace(config.train, branch_from="")))
    for own in (folder / "same").glob("iter_*"):
        shutil.rmtree(own)
    (folder / "same" / TRACKER).unlink()
    ((lines, said), _) = run_ranks(run, 2, config)
    assert any(one.startswith("branching from") for one in said)
    parent = figures(trained[0][0][0])[PARENT_DONE:]
    assert [line["consumed_samples"] for line in lines] == [line["consumed_samples"] for line in parent]
    for line, expected in zip(lines, parent, strict=True):
        assert line["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"lr_decay_steps": 0}, {"lr_decay_steps": 3}, []),
        ({"lr_decay_steps": 0}, {"lr_decay_steps": 5}, ["rate is 0.00075 in step 4.* be 0.001 .*lr_decay_steps 3,"]),
        ({}, {"lr_decay_steps": 3}, ["rate is 0.001 in step 4.* be 0.00075 "]),
        ({"auxiliary_lr_schedule": "1"}, {"auxiliary_lr_schedule": "1 -> 1 at 50% -> 0 at 100%"}, []),
        (
            {"auxiliary_lr_schedule": "1", "auxiliary_lr": 5e-4},
            {"auxiliary_lr_schedule": "0.5", "auxiliary_lr": 5e-4},
            ["rate of the auxiliary is 0.00025 in step 4.* be 0.0005 "],
        ),
        ({}, {"auxiliary_lr_schedule": "1"}, ["rate of the auxiliary is 0.001 in step 4.* be 0.00075 "]),
    ],
)
def test_rates_that_do_not_join_the_parents_are_said(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], told: list[str]
) -> None:
    save_config(config_for(tmp_path, there), tmp_path / "run_config.yaml")
    (tmp_path / "progress.json").write_text(json.dumps({"step": PARENT_DONE}))
    found = rate_jumps(tmp_path, config_for(tmp_path, here))
    assert len(found) == len(told) and all(map(re.search, told, found)), found


def last_rates(configs: list[Config]) -> list[tuple[float, float]]:
    """Of each run's last step: the shared table's, and that of a weight that the auxiliary alone has."""
    found = []
    for config in configs:
        trainer = start(config)
        trainer.restore()
        with patch.object(trainer_module, "copy_tokenizer"):
            trainer.train()
        home = trainer.optimizer.shared
        own = {
            parameter: home.optimizer.param_groups[group]["lr"]
            for parameter, (group, _) in home.model_param_group_index_map.items()
        }
        named = {
            prefix + name: value
            for prefix, module in trainer.pair.modules()
            for name, value in module.named_parameters()
        }
        found.append((own[named["tied.word.weight"]], own[named["aux.head.dense.weight"]]))
        trainer.close()
    return found


def test_the_auxiliarys_own_schedule_may_begin_end_and_change_in_a_branch(tmp_path: Path) -> None:
    def config(name: str, written: str, parent: str = "") -> Config:
        point = str(iteration_folder(tmp_path / parent, PARENT_DONE)) if parent else ""
        optimizer = {"lr_decay_steps": 0, "auxiliary_lr_schedule": written}
        return config_for(tmp_path / name, optimizer, branch_from=point, train_steps=4 if parent else PARENT_DONE)

    runs = [
        config("plain", ""),
        config("own", "0.5"),
        config("begins", "0.25", "plain"),
        config("ends", "", "own"),
        config("changes", "0.5 -> 0.5 at step 3 -> 0.125 at step 4", "own"),
    ]
    (rates,) = run_ranks(last_rates, 1, runs)
    assert rates == [(1e-3, 1e-3), (1e-3, 5e-4), (1e-3, 2.5e-4), (1e-3, 1e-3), (1e-3, 5e-4)]


def test_what_is_no_branch_is_refused_with_all_differences(folder: Path, trained: Any) -> None:
    point = iteration_folder(folder / "parent", PARENT_DONE)
    config = config_for(
        folder / "new", {"adam_beta1": 0.5, "lr_decay_steps": 2}, branch_from=str(point), seed=9, train_steps=3
    )
    with pytest.raises(UserError) as caught:
        beginning(config)
    assert caught.value.problems == [
        "optimizer.adam_beta1 is 0.5, but the checkpoint was made with 0.9",
        "train.seed is 9, but the checkpoint was made with 1",
        "train.train_steps is 3, but the branch begins after step 3; give more",
        f"{point}: give the values of this checkpoint, or choose another train.branch_from",
    ]
    with pytest.raises(UserError, match="parent is no checkpoint .*; give one, such as .*parent/iter_0000006$"):
        beginning(config_for(folder / "new", branch_from=str(folder / "parent")))
    with pytest.raises(UserError, match="nowhere is no checkpoint .*; give one, such as iter_0005000 of a run folder"):
        beginning(config_for(folder / "new", branch_from=str(folder / "nowhere")))


def of_other_data(config: Config) -> None:
    trainer = start(config)
    try:
        shards = [replace(shard, sha256="another") for shard in trainer.corpus.train_shards]  # type: ignore[type-var]
        trainer.corpus = replace(trainer.corpus, train_shards=shards)
        with pytest.raises(UserError, match="the shards of data.train are not those that .*parent was trained on"):
            trainer.restore()
    finally:
        trainer.close()


def test_a_branch_on_other_data_is_refused(folder: Path, trained: Any) -> None:
    run_ranks(of_other_data, 1, config_for(folder / "new", branch_from=str(iteration_folder(folder / "parent", 3))))
