"""A spike is skipped, noted, and skipped again by a resumed run; what stays high is none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from metro_megatron.checkpoint.files import TRACKER, tracked_step
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.parallel import optim
from metro_megatron.train import spikes
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.replay import Replayed, replay
from metro_megatron.train.spikes import LEAST, LENGTH, NormHistory
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus
from tests.train.test_trainer import run

SPIKE = 9
LASTING = ("step", "aux_loss", "rtd_loss", "clm_loss", "grad_norm", "skipped_steps", "digest")


def test_the_limit_is_robust_and_late_and_survives_a_checkpoint() -> None:
    norms = np.random.default_rng(0).lognormal(size=400)
    history, resumed = NormHistory(6.0), NormHistory(6.0)
    for step, norm in enumerate(norms):
        known = norms[: max(0, step - 1)][-LENGTH:]
        expected = math.inf
        if len(known) >= LEAST:
            expected = np.median(known) + 6 * 1.4826 * np.median(np.abs(known - np.median(known)))
        assert history.limit(step) == pytest.approx(expected)
        history.add(step, norm)
    resumed.load_state(json.loads(json.dumps(history.state())))
    assert resumed.limit(400) == history.limit(400) and resumed.limit(401) == history.limit(401)
    for step in range(400, 400 + LENGTH):
        history.add(step, 1000.0 + step % 7)
    assert history.limit(400 + LENGTH + 1) > 1000, "what stays high is no spike"
    assert NormHistory(0.0).limit(1) == math.inf


@contextmanager
def spike() -> Iterator[None]:
    """The squares of one step's gradients are a million times as large; 4 steps are enough to know."""
    squares, update, at = optim._sum_of_squares, optim.Optimizer.step, -1

    def spiked(optimizer: Any, like: Any) -> Any:
        return squares(optimizer, like) * (1e6 if at == SPIKE - 1 else 1.0)

    def step(self: Any, number: int, *others: Any) -> Any:
        nonlocal at
        at = number
        return update(self, number, *others)

    with (
        patch.object(optim, "_sum_of_squares", spiked),
        patch.object(optim.Optimizer, "step", step),
        patch.object(spikes, "LEAST", 4),
    ):
        yield


def run_with_spike(config: Config, stop_after: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    with spike():
        return run(config, stop_after=stop_after)


def replay_with_spike(config: Config) -> Replayed:
    """The step behind the spike, from the checkpoint before it."""
    with spike(), patch.object(Corpus, "open", small_corpus):
        return replay(Path(config.train.output), SPIKE + 1, torch.device("cpu"), lambda done, last: None)


def test_a_spike_is_skipped_and_noted_and_skipped_again_by_a_resumed_run(tmp_path: Path) -> None:
    """The run is taken up two steps before it, where its own steps alone would not be enough to know."""
    config = small_config(train={"output": str(tmp_path), "train_steps": 11, "log_interval": 3})
    config = replace(
        config,
        optimizer=replace(config.optimizer, skip_spikes=30.0),
        checkpoint=replace(config.checkpoint, save_interval=7),
    )
    ((lines, _),) = run_ranks(run_with_spike, 1, config)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped_for_norm"]) for line in journal] == [(SPIKE, lines[2]["grad_norm"])]
    assert lines[2]["grad_norm"] > 100 * lines[1]["grad_norm"]
    (replayed,) = run_ranks(replay_with_spike, 1, config)
    assert [(line.step, line.is_same) for line in replayed.lines] == [(9, True), (11, True)]
    assert max(max(line.differences.values()) for line in replayed.lines) < 1e-6
    shutil.rmtree(tmp_path / "iter_0000011")
    ((again, _),) = run_ranks(run_with_spike, 1, config)
    for line, same in zip(again, lines, strict=True):
        assert {key: line[key] for key in LASTING} == {key: same[key] for key in LASTING}


def test_a_run_that_goes_back_is_one_that_passes_over_these_samples(tmp_path: Path) -> None:
    """Whether it is interrupted behind, or not; the journal says what it went back from, and replay passes over it."""
    config = small_config(train={"train_steps": 12, "log_interval": 3, "bad_steps": "rollback"})
    config = replace(
        config,
        optimizer=replace(config.optimizer, skip_spikes=30.0),
        checkpoint=replace(config.checkpoint, save_interval=7, keep_last=0),
    )

    def into(name: str, **train: Any) -> Config:
        return replace(config, train=replace(config.train, output=f"{tmp_path}/{name}", **train))

    ((lines, said),) = run_ranks(run_with_spike, 1, into("back"))
    assert f"going back, and past the samples of steps 8 to {SPIKE}" in " ".join(said)
    ((planned, _),) = run_ranks(run_with_spike, 1, into("planned", skip_steps=["8-9"]))
    assert [line["step"] for line in lines] == [line["step"] for line in planned] == [3, 6, 12], (
        "no line of a step passed over"
    )
    noted = [json.loads(line) for line in (tmp_path / "back" / "journal.jsonl").read_text().splitlines()]
    assert [line["rolled_back_to"] for line in noted if "rolled_back_to" in line] == [7]
    shutil.rmtree(tmp_path / "back" / "iter_0000012")
    ((resumed, _),) = run_ranks(run, 1, into("back"))
    for line, same, again in zip(lines, planned, resumed, strict=True):
        assert {key: line[key] for key in LASTING} == {key: same[key] for key in LASTING}
        assert {key: line[key] for key in LASTING} == {key: again[key] for key in LASTING}
    (replayed,) = run_ranks(replay_with_spike, 1, into("back"))
    assert [(line.step, line.is_same) for line in replayed.lines] == [(12, True)]
    with pytest.raises(UserError, match="was passed over: the run went back from it"):
        replay(tmp_path / "back", SPIKE, torch.device("cpu"), lambda done, last: None)
    for begun in (("iter_0000007", "iter_0000012"), ("iter_0000012",)):  # anew, and then once more from its own 7
        for name in begun:
            shutil.rmtree(tmp_path / "back" / name)
        if len(begun) == 2:
            (tmp_path / "back" / TRACKER).unlink()
        ((lines, _),) = run_ranks(run, 1, into("back"))
        assert [line["step"] for line in lines] == [3, 6, 9, 12]


def test_a_run_that_is_told_to_end_at_a_bad_step_ends_and_goes_back_when_it_is_begun_again(tmp_path: Path) -> None:
    config = small_config(
        train={"output": str(tmp_path), "train_steps": 12, "log_interval": 3, "bad_steps": "rollback"}
    )
    config = replace(
        config,
        optimizer=replace(config.optimizer, skip_spikes=30.0),
        checkpoint=replace(config.checkpoint, save_interval=7),
    )
    ((_, said),) = run_ranks(run_with_spike, 1, config, SPIKE)
    assert f"step {SPIKE}: gradient norm" in said[-1] and said[-1].endswith("goes back from it")
    assert tracked_step(tmp_path) == 7 and any(one.startswith(f"saved {tmp_path / 'iter_0000007'}") for one in said)
    ((lines, said),) = run_ranks(run_with_spike, 1, config)
    assert f"going back, and past the samples of steps 8 to {SPIKE}" in " ".join(said)
    assert [line["step"] for line in lines] == [3, 6, 12] and tracked_step(tmp_path) == 12
    assert len([one for one in said if "after the start of the process" in one]) == 1


@pytest.mark.parametrize(("policy", "saves"), [("stop", 7), ("rollback", 100)])
def test_a_run_ends_at_a_bad_step_if_it_shall_or_has_nowhere_to_go(tmp_path: Path, policy: str, saves: int) -> None:
    config = small_config(train={"output": str(tmp_path), "train_steps": 12, "log_interval": 3, "bad_steps": policy})
    config = replace(
        config,
        optimizer=replace(config.optimizer, skip_spikes=30.0),
        checkpoint=replace(config.checkpoint, save_interval=saves),
    )
    with pytest.raises(Exception, match=f"step {SPIKE}: gradient norm .* is a spike, and train.bad_steps is {policy}"):
        run_ranks(run_with_spike, 1, config)
