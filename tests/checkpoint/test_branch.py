"""A run that branches from another's checkpoint: equal to it where nothing differs, and else only in its plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.checkpoint.files import TRACKER, checkpoint_sha256, iteration_folder, tracked_step
from metro_megatron.checkpoint.read import SEGMENTS
from metro_megatron.checkpoint.resume import beginning
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
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
    (parent, same, _), (weights, equal, other) = trained
    assert figures(same[0]) == figures(parent[0])[PARENT_DONE:]
    assert all(tensor.equal(equal[name]) for name, tensor in weights.items())
    assert not all(tensor.equal(other[name]) for name, tensor in weights.items())
    point = iteration_folder(folder / "parent", PARENT_DONE)
    assert f"branching from {point} after step {PARENT_DONE}" in same[1]
    progress = json.loads((iteration_folder(folder / "same", 6) / "progress.json").read_text())
    assert progress["branch"] == {"step": PARENT_DONE, "checkpoint": checkpoint_sha256(point)}
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
