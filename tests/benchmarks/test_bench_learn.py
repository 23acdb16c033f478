"""The minute of learning on a GPU: what it trains may be trained there, and it says when a loss does not fall."""

from pathlib import Path

import pytest

from benchmarks.bench_learn import ARMS, Options, arm_config, main, verdict
from metro_megatron.config.problems import setting_problems
from metro_megatron.errors import UserError


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_at_the_size_for_a_gpu(arm: str) -> None:
    config = arm_config(arm, Options(), Path("out"))
    assert setting_problems(config, 1) == []
    assert (config.model.hidden_size, config.train.precision, config.train.train_steps) == (512, "bf16", 600)
    assert config.optimizer.lr_warmup_steps == 37
    assert arm_config(arm, Options(device="cpu"), Path("out")).model.hidden_size == 128


@pytest.mark.parametrize("last, has_fallen", [(7.0, True), (8.1, False), (float("nan"), False)])
def test_losses_that_do_not_fall_are_told(last: float, has_fallen: bool) -> None:
    rows = [{"step": 25, "aux_loss": 8.0, "tokens_per_s": 10.0}, {"step": 50, "aux_loss": last, "tokens_per_s": 9.0}]
    found = verdict("metro", "aux_loss", rows)
    assert found["has_fallen"] == has_fallen and ("NOT FALLEN" in found["text"]) != has_fallen


def test_one_row_tells_nothing() -> None:
    with pytest.raises(UserError, match="--steps is 30, must be at least twice"):
        main(Options(device="cpu", steps=30))
