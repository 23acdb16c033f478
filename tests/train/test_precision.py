"""bf16 and fp16 follow fp32; the loss scale of fp16 is one for both homes."""

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.parallel.optim import Update, learning_rate
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import STEPS, run_steps, small_config, small_corpus, start, train_in_layouts

LOSSES = ("aux_loss", "rtd_loss", "clm_loss")


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16", 1e-2), pytest.param("fp16", 2e-3, marks=pytest.mark.long)]
)
def test_half_precision_follows_fp32_in_every_layout(precision: str, tolerance: float) -> None:
    """Losses of six steps; 8 and 11 bits of mantissa. Layouts differ by less than precisions."""
    (exact,) = run_ranks(train_in_layouts, 1, [small_config()])[0]
    half = [
        small_config(train={"precision": precision}, optimizer={"initial_loss_scale": 1024.0}, parallel=parallel)
        for parallel in ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2})
    ]
    for record in run_ranks(train_in_layouts, 2, half)[0]:
        for figures, expected in zip(record.figures, exact.figures, strict=True):
            for name in LOSSES:
                assert figures[name] == pytest.approx(expected[name], rel=tolerance), name
        exact_norms = [norm for norm, _, _ in exact.grad_norms]
        np.testing.assert_allclose([norm for norm, _, _ in record.grad_norms], exact_norms, rtol=10 * tolerance)


def gradient_formats(configs: list[Config]) -> list[tuple[set[torch.dtype], list[float]]]:
    """On every rank: formats of the gradient buffers, and losses and norms of the steps."""
    found = []
    for config in configs:
        trainer = start(config)
        figures, norms = run_steps(trainer, 0, STEPS)
        buffers = [buffer for ddp in trainer.homes.all for buffer in ddp.buffers]
        formats = {buffer.grad_data.dtype for buffer in buffers if buffer.param_dtype != torch.float32}
        found.append((formats, [one[name] for one in figures for name in LOSSES] + [norm for norm, *_ in norms]))
        trainer.close()
    return found


def test_gradients_in_the_runs_own_format() -> None:
    """parallel.grad_reduce_in_fp32 false: half the bytes, sums over 2 ranks in bf16, and close to FP32 sums."""
    half = {"precision": "bf16"}
    configs = [small_config(train=half, parallel={"grad_reduce_in_fp32": option}) for option in (True, False)]
    (exact_format, exact), (own_format, own) = run_ranks(gradient_formats, 2, configs)[0]
    assert (exact_format, own_format) == ({torch.float32}, {torch.bfloat16})
    assert own != exact
    np.testing.assert_allclose(own, exact, rtol=1e-2)


def starts(config: Config) -> list[torch.Tensor]:
    """What a lone process's optimizer begins with, flat."""
    trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
    found = []
    for one in trainer.optimizer.both:
        groups = [*one.model_fp32_groups, *one.shard_fp32_from_float16_groups]
        found += [weight.detach().reshape(-1).clone() for group in groups for weight in group]
    weights = [named for _, module in trainer.pair.modules() for named in module.named_parameters()]
    in_fp32 = {name for name, weight in weights if weight.dtype == torch.float32}
    assert config.train.precision == "fp32" or in_fp32 == {"main_table.weight", "table.weight"}
    trainer.close()
    return found


def test_masters_start_from_the_draw_that_weights_are_rounded_from() -> None:
    exact, half = (run_ranks(starts, 1, small_config(train={"precision": one}))[0] for one in ("fp32", "bf16"))
    assert len(exact) == len(half), "megatron-core's groups are in another order"
    assert all(any(one.equal(other) for other in exact) for one in half)
    assert not all(one.equal(one.bfloat16().float()) for one in half)


def overflowing_steps(config: Config) -> tuple[list[Update], bool]:
    """On every rank: updates from a loss scale that is far too large, and whether skipped steps left weights alone."""
    trainer = start(config)
    data, updates = trainer.corpus.training_data(trainer.layout), []
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    weight = trainer.pair.shared["tied"].word.weight
    first = before = weight.detach().clone()
    for step in range(STEPS):
        batch = data.step_batch(step, step * trainer.config.train.global_batch_size)
        updates.append(trainer.step.train(batch, metrics).read())
        trainer.homes.fetch_parameters()
        assert not updates[-1].is_skipped or (weight == before).all()
        before = weight.detach().clone()
    has_changed = bool((before != first).any())
    assert trainer.optimizer.shared.grad_scaler is trainer.optimizer.stage.grad_scaler
    trainer.close()
    return updates, has_changed


def test_overflow_skips_the_step_and_halves_one_scale() -> None:
    """hysteresis 1: every overflow halves the scale; the same decision on all ranks and for both homes."""
    options = {"initial_loss_scale": 2.0**17, "hysteresis": 1, "loss_scale_window": 2}
    config = small_config(train={"precision": "fp16"}, optimizer=options, parallel={"pipeline_model_parallel_size": 2})
    (first, has_changed), (second, _) = run_ranks(overflowing_steps, 2, config)
    assert [update.is_skipped for update in first] == [update.is_skipped for update in second]
    assert first[0].is_skipped and not all(update.is_skipped for update in first) and has_changed
    scale = 2.0**17
    good_in_a_row = 0
    for update in first:
        assert update.loss_scale == scale
        good_in_a_row = 0 if update.is_skipped else good_in_a_row + 1
        if update.is_skipped:
            scale /= 2
        elif good_in_a_row == 2:
            scale, good_in_a_row = scale * 2, 0


def test_learning_rate_is_linear_up_and_down() -> None:
    options = small_config(optimizer={"lr": 1.0, "lr_warmup_steps": 4}).optimizer
    rates = [learning_rate(step, options, 10) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
