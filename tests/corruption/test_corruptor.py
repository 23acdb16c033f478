"""The seat of corruption: what else may stand there than METRO's auxiliary model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.encoder import AuxiliaryModel, Borrowed, TiedParameters
from metro_megatron.model.init import initialize
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.parallel.layout import Layout
from metro_megatron.train import build
from metro_megatron.train.metrics import MetricSums
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, run_steps, small_config, start, whole_weights

STEPS = 8


class Uniform(Corruptor):
    """Any word instead of a masked one: a function of the noise keys, so that every layout draws the same."""

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        self.words = config.model.vocab_size - NUM_SPECIALS

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        return Proposal(NUM_SPECIALS + (micro_batch.noise_keys[:, 0].long() & 0x7FFFFFFF) % self.words, {})


class Mask(Corruptor):
    """<mask> stays: main is a masked language model in one phase."""

    def __init__(self, *parts: object):
        pass

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        return Proposal(torch.full_like(micro_batch.masked_targets, MASK_ID), {})


class Frozen(Corruptor):
    """An auxiliary model that learns nothing, with a token table of its own: main's would change under it."""

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        self.term, self.group = MaskedLanguageModel(config), layout.tensor
        transformer = mcore.auxiliary_config(config, layout.device)
        head = self.term.head(transformer)
        self.model = AuxiliaryModel(transformer, config.model, Borrowed(), layout.shared_groups, head)
        initialize(self.model.requires_grad_(False).eval(), "frozen.", config.model, 3, layout.tensor)

    @torch.no_grad()
    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        found = self.term.statistics(self.model(micro_batch), micro_batch, self.group, micro_batch.noise_keys)
        assert found.sampled is not None
        return Proposal(found.sampled, {})


@dataclass
class Run:
    figures: list[Figures]
    modules: list[str]
    """Names of the shared modules."""
    trained: set[str]
    """First parts of the names of what has gradient buffers."""
    weights: dict[str, torch.Tensor]
    changed: list[float]
    """Share of the masked tokens of the first step that are not the original ones, per micro batch."""
    is_masked_text: bool


def train(corruptor: Callable[..., Corruptor], config: Config) -> Run:
    """On every rank: a few steps, which need neither an auxiliary model nor its figures."""
    with patch.object(build, "build_corruptor", corruptor):
        trainer = start(config)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    trainer.homes.fetch_parameters()
    corrupted = trainer.step.evaluate(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    pairs = list(zip(corrupted, batch.micro_batches, strict=True))
    figures, _ = run_steps(trainer, 0, STEPS)
    trainer.homes.fetch_parameters()
    wrapped = {name for name, ddp in trainer.homes.shared.items() if any(p.requires_grad for p in ddp.parameters())}
    run = Run(
        figures,
        list(trainer.pair.shared),
        wrapped | {"main"},
        whole_weights(trainer),
        [float((tokens != one.tokens).sum() / one.masked_index.numel()) for tokens, one in pairs if one.is_real.any()],
        all(torch.equal(tokens, one.masked_tokens) for tokens, one in pairs),
    )
    trainer.close()
    return run


def run(corruptor: Callable[..., Any], ranks: int = 1, **concerns: dict[str, Any]) -> Run:
    config = small_config(train={"train_steps": 50}, optimizer={"lr": 5e-3}, **concerns)
    return run_ranks(train, ranks, corruptor, config)[0]


def test_fifteen_lines_of_uniform_noise_train_and_every_layout_agrees() -> None:
    one, two = run(Uniform), run(Uniform, 2, parallel={"pipeline_model_parallel_size": 2})
    assert one.modules == ["tied"] and one.trained == {"tied", "main"}
    assert not any(name.startswith("aux.") for name in one.weights)
    assert all(0.9 < changed <= 1 for changed in one.changed), one.changed
    assert one.figures[-1]["rtd_loss"] < 0.9 * one.figures[0]["rtd_loss"], "uniform noise is easily told"
    assert "aux_loss" not in {name for name, value in one.figures[0].items() if value}
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=0, atol=1e-5, msg=name)


def test_masks_that_stay_are_one_encoder_in_one_phase() -> None:
    found = run(Mask)
    assert found.is_masked_text and found.modules == ["tied"]
    assert found.changed == [1.0] * len(found.changed)
    assert found.figures[-1]["rtd_loss"] < 0.5 * found.figures[0]["rtd_loss"], "<mask> gives itself away"


def test_a_frozen_auxiliary_has_no_gradient_buffer_no_optimizer_state_and_no_part_of_the_checkpoint() -> None:
    found = run(Frozen)
    assert found.modules == ["tied"] and found.trained == {"tied", "main"}
    assert not any(name.startswith("aux.") for name in found.weights)
    assert all(0.9 < changed <= 1 for changed in found.changed), "an untrained model is nearly uniform"
    assert found.figures[-1]["rtd_loss"] < 0.9 * found.figures[0]["rtd_loss"]
