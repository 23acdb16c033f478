"""The step's seats: a head on a middle layer, whose loss rides on the activations, and a second view for main."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.views import View
from metro_megatron.model.encoder import Reading
from metro_megatron.model.init import global_parameters
from metro_megatron.objective.clm import CorrectiveLanguageModel
from metro_megatron.objective.rtd import ReplacedTokenDetection
from metro_megatron.objective.term import Sums, Term
from metro_megatron.parallel.layout import Layout
from metro_megatron.schedule import Schedule
from metro_megatron.train import build
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, small_config, start, whole_weights

NUM_LAYERS = 4


class EarlyDetection(ReplacedTokenDetection):
    """Replaced token detection behind a middle layer, beside the one at the end."""

    name = "early"
    sums = {f"early_{name}": size for name, size in ReplacedTokenDetection.sums.items()}
    layer = 2

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        loss, sums = super().loss(reading, view, layout)
        return loss, {f"early_{name}": value for name, value in sums.items()}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"early_loss": float(sums["early_rtd_loss"]) / max(float(sums["num_tokens"]), 1.0)}


class TopDetection(EarlyDetection):
    """The same on the last layer: its output is what the heads behind the encoder read."""

    layer = NUM_LAYERS


class EndDetection(EarlyDetection):
    """The same behind the encoder, as every other head."""

    layer = None


class Agreement(Term):
    """Squared distance of the states of <s> in the corrupted text and in the original one, main's second view."""

    name = "agreement"
    exported = ""
    sums = {"agreement_loss": 1}
    panels = ()
    factor = 1.0

    @property
    def weight(self) -> Schedule:
        return Schedule(self.factor)

    def head(self, config: Any) -> nn.Module | None:
        return None

    def second_view(self, view: View) -> View:
        return View(view.micro_batch.tokens, view.micro_batch)

    def denominator(self, batch: StepBatch) -> int:
        return batch.num_tokens

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        first, second = reading.hidden.flatten(0, 1)[view.micro_batch.first_index].chunk(2)
        loss = (first - second).square().sum()
        return loss, {"agreement_loss": loss.detach()}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"agreement_loss": float(sums["agreement_loss"]) / max(float(sums["num_tokens"]), 1.0)}


class Unweighted(Agreement):
    """Read, but of no weight."""

    factor = 0.0


METRO: tuple[type[Term], ...] = (ReplacedTokenDetection, CorrectiveLanguageModel)


@dataclass
class Found:
    figures: Figures
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    by_hand: float
    """Agreement of the first step, from two passes of one view each."""


def one_step(terms: tuple[type[Term], ...], config: Config) -> Found:
    """On every rank: the first step with these losses of main; gradients as they are on this rank."""
    with patch.object(build, "main_terms", lambda config: [term(config) for term in terms]):
        trainer = start(config)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    by_hand = agreement_by_hand(trainer, batch) if Agreement in terms and trainer.layout.world.size() == 1 else 0.0
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    gradients: dict[str, Tensor] = {}
    update = trainer.optimizer.step

    def keep(step: int, *others: Any) -> Any:
        for prefix, module in trainer.pair.modules():
            for name, parameter in global_parameters(module, prefix):
                gradients[name] = parameter.main_grad.clone()  # type: ignore[attr-defined]
        return update(step, *others)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    norm = trainer.step.train(batch, metrics).read().grad_norm
    trainer.homes.fetch_parameters()
    found = Found(metrics.reduce(), norm, gradients, whole_weights(trainer), by_hand)
    trainer.close()
    return found


@torch.no_grad()
def agreement_by_hand(trainer: Any, batch: StepBatch) -> float:
    """Each view by itself, in one process."""
    corrupted = trainer.step.evaluate(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    total, model = 0.0, trainer.pair.main[0]
    for tokens, micro_batch in zip(corrupted, batch.micro_batches, strict=True):
        views = (View(tokens, micro_batch), View(micro_batch.tokens, micro_batch))
        noised, clean = (model(view).hidden.flatten(0, 1)[view.micro_batch.first_index] for view in views)
        total += float((noised - clean).square().sum())
    return total / batch.num_tokens


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, **parallel: object) -> Config:
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
    }
    return small_config(parallel={**sizes, **parallel})


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_loss_on_the_last_layer_is_the_loss_behind_the_encoder(recompute: str) -> None:
    """Riding on the activations or returned to the schedule: values and every gradient, also with recomputation."""
    config = layout(recompute=recompute)
    riding, plain = (run_ranks(one_step, 1, (*METRO, term), config)[0] for term in (TopDetection, EndDetection))
    assert riding.figures["early_loss"] == plain.figures["early_loss"] > 0
    assert riding.gradients.keys() == plain.gradients.keys() and "main.early_head.weight" in riding.gradients
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(riding.gradients[name], gradient, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("ranks", "config"),
    [(2, layout(pp=2)), (4, layout(tp=2, pp=2, vpp=2, sequence_parallel=True, recompute="full"))],
    ids=["pp", "tp-pp-vpp-sp-recompute"],
)
def test_a_head_on_a_middle_layer_is_the_same_in_every_layout(ranks: int, config: Config) -> None:
    terms = (*METRO, EarlyDetection)
    one = run_ranks(one_step, 1, terms, layout())[0]
    for found in run_ranks(one_step, ranks, terms, config):
        assert found.figures["early_loss"] == pytest.approx(one.figures["early_loss"], rel=1e-6)
        assert found.norm == pytest.approx(one.norm, rel=1e-6)
        for name, weight in one.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-6, msg=name)
    alone = run_ranks(one_step, 1, METRO, layout())[0]
    assert alone.figures["rtd_loss"] == one.figures["rtd_loss"] and alone.norm != one.norm


def test_a_second_view_is_read_and_disturbs_nothing() -> None:
    """Its value is that of two passes; without weight the step is the one without it; rows and layout are free."""
    terms = (*METRO, Agreement)
    packed = run_ranks(one_step, 1, terms, layout())[0]
    assert packed.figures["agreement_loss"] == pytest.approx(packed.by_hand, rel=1e-5) and packed.by_hand > 0
    padded = run_ranks(one_step, 1, terms, small_config(data={"row_format": "padded"}))[0]
    staged = run_ranks(one_step, 2, terms, layout(pp=2))[0]
    for found in (padded, staged):
        for name, value in packed.figures.items():
            if name not in ("non_pad_fraction",):
                assert found.figures[name] == pytest.approx(value, rel=1e-5), name
        assert found.norm == pytest.approx(packed.norm, rel=1e-6)
    idle, alone = (run_ranks(one_step, 1, terms, layout())[0] for terms in ((*METRO, Unweighted), METRO))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(idle.weights[name], weight, rtol=0, atol=1e-6, msg=name)
    assert packed.norm != alone.norm
