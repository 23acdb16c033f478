"""FLOPs are those of recipes' tables, and within 0.1% those that torch counts in a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused.dispatch import reference_only
from metro_megatron.config.early_exit import Exits
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.data.samples import build_sample_index
from metro_megatron.plan.flops import Amount, done_flops, main_flops, model_flops, narayanan_flops, works
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.parity.small_run import VOCAB_SIZE, MemoryShard, small_config
from tests.plan.builds import BUILDS, Changes

LENGTH = 64
RECOMPUTED: dict[str, Changes] = {
    "recomputed": {"parallel": {"recompute": "full"}},
    "GELU again": {"parallel": {"recompute": "selective"}},
    "modules again": {
        "parallel": {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
        "model": {"norm_first": True},
    },
}
ALIKE = ("another width", "t5 buckets", "no reset", "no buckets", "nothing shared", "shared positions", "shared norm")
"""Builds in which other numbers are stored, or a few, and hardly others multiplied."""
BASE_PLUS = ["--train.train_steps", "1950000"]


@pytest.mark.parametrize(
    ("argv", "exact", "recomputed", "narayanan"),
    [
        (["--config", "base"], 1.22e8, 1.63e8, None),
        (["--config", "base", *BASE_PLUS], 1.91e9, 2.54e9, None),
        (["--config", "large_pp"], 5.50e9, 7.34e9, None),
        (["--config", "xl"], 2.13e10, 2.83e10, 3.22e10),
        (["--config", "xxl"], 7.30e10, 9.73e10, 1.04e11),
    ],
)
def test_total_teraflops_of_metros_runs(
    argv: list[str], exact: float, recomputed: float, narayanan: float | None
) -> None:
    """2,048 samples of 512 a step: three passes, four passes, and "following Smith et al."."""
    config = parse_config(argv)
    run = Amount.of_samples(2048, 512) * config.train.train_steps
    assert model_flops(config, run) / 1e12 == pytest.approx(exact, rel=0.005)
    full = replace(config, parallel=replace(config.parallel, recompute="full"))
    assert done_flops(full, run) / 1e12 == pytest.approx(recomputed, rel=0.005)
    if narayanan:
        assert narayanan_flops(config, run.tokens) / 1e12 == pytest.approx(narayanan, rel=0.005)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("base", [62.9, 29.7, 188.7, 29.5]),
        ("large_pp", [163.6, 39.6, 654.3, 39.3]),
        ("xl", [478.2, 59.7, 2868.9, 59.0]),
        ("xxl", [1300.2, 100.3, 10401.9, 98.3]),
    ],
)
def test_forward_flops_of_a_token(preset: str, expected: list[float]) -> None:
    """MFLOP of auxiliary layers and head, main layers and head; half the length costs that much less attention."""
    config = parse_config(["--config", preset])
    token = {work.name: work.forward(Amount.of_samples(1, 512)) / 512 / 1e6 for work in works(config)}
    grouped = [sum(value for name, value in token.items() if name.startswith(group)) for group in GROUPS]
    assert grouped == pytest.approx(expected, abs=0.06)
    longer, shorter = Amount.of_samples(1, 512), Amount.of_samples(2, 256)
    layers = config.model.num_layers + config.model.auxiliary_num_layers
    saved = model_flops(config, longer) - model_flops(config, shorter)
    assert saved == pytest.approx(3 * layers * 4 * config.model.hidden_size * 256 * 512)


GROUPS = ("auxiliary layers", "auxiliary head", "main layers", "clm head")


def test_passes_of_an_auxiliary() -> None:
    """Trained 3 or 4, frozen 1, none 0: base saves 20 and 30% of its FLOPs, Fast-ELECTRA's lower ends."""
    step = Amount.of_samples(2048, 512)
    flops = {
        name: model_flops(parse_config(["--config", "base", f"--{name}"]), step)
        for name in (
            "corruption.source=auxiliary",
            "model.auxiliary_dropout=eval",
            "corruption.source=frozen",
            "corruption.source=cached",
            "corruption.source=uniform",
        )
    }
    trained, twice, frozen, cached, uniform = flops.values()
    assert cached == uniform and twice - trained == pytest.approx((trained - cached) / 3) == frozen - cached
    assert (1 - frozen / trained, 1 - cached / trained) == pytest.approx((0.20, 0.30), abs=0.003)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE)) for name in (*BUILDS, *RECOMPUTED)]
)
def test_flops_of_a_step(name: str) -> None:
    """All that torch multiplies in a step. Samples are of one length: the reference computes scores of padding, too."""
    config = small_config(**{**BUILDS, **RECOMPUTED}[name])
    config = replace(config, data=replace(config.data, seq_length=LENGTH, micro_batch_tokens=8 * LENGTH))
    trainer = Trainer(config, _corpus(config), torch.device("cpu"))
    try:
        batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
        with reference_only(), FlopCounterMode(display=False) as counter:
            trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    finally:
        trainer.close()
    samples, objective = config.train.global_batch_size, config.objective
    assert (batch.num_tokens, batch.num_squares) == (samples * LENGTH, samples * LENGTH**2)
    masked = batch.num_masked / batch.num_tokens
    drawn = replace(config, objective=replace(objective, mask_probability=masked))
    amount = Amount(batch.num_tokens, batch.num_squares, samples, len(batch.micro_batches))
    planned = done_flops(drawn, amount)
    if config.model.auxiliary_dropout == "eval":
        # Where there is no backward pass, the reference computes logits a second time, and the kernel does not.
        planned += sum(
            one.forward(amount)
            for one in works(drawn)
            if one.where == "corruption" and one.name.endswith("head, decoder")
        )
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-3)


def _corpus(config: Config) -> Corpus:
    """Documents that are one sample of seq_length each."""
    lengths = np.full(100, LENGTH - 2, dtype=np.int32)
    tokens = 5 + np.arange(lengths.sum()) * 7 % (VOCAB_SIZE - 5)
    shard = MemoryShard(tokens.astype(np.uint16), lengths, np.arange(len(lengths) + 1))
    return Corpus(config, [shard], build_sample_index([shard], config.data.seq_length), [], None)


def test_tokens_that_leave_early_are_counted() -> None:
    """A constant share as it is, a schedule by its mean over the run; the exits' heads come on top."""
    amount = Amount.of_samples(2.0**16, 512)
    half, rising, full = (
        parse_config(["--config", "base", "--early_exit.layers", "4", "8", "--early_exit.share", share])
        for share in ("0.5", "0 -> 1 at 100%", "0")
    )
    rows, squares = int(amount.tokens), amount.squares
    saved = main_flops(half.model, None, rows, squares) - main_flops(half.model, Exits((4, 8), 0.5), rows, squares)
    whole = model_flops(parse_config(["--config", "base"]), amount)
    assert whole - model_flops(half, amount) == pytest.approx(3 * saved, rel=1e-9)
    assert model_flops(rising, amount) == pytest.approx(model_flops(half, amount), rel=1e-3)
    assert model_flops(full, amount) - whole == pytest.approx(3 * 2 * amount.tokens * 2 * 768, rel=1e-9)
