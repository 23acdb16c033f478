"""Main's own layers fill its masks: the hidden states of those layers, and gradients that reach them in both phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fused.linear_cross_entropy import gumbel_noise
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.views import View
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from metro_megatron.vocabulary import NUM_SPECIALS
from tests.distributed import run_ranks
from tests.parity.small_run import VOCAB_SIZE, small_config, start, train_in_layouts

LAYER = 3


def config_of(mode: str = "zero", **concerns: dict[str, Any]) -> Config:
    return small_config(
        model={"auxiliary_dropout": mode, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        corruption={"source": "main", "main_layer": LAYER},
        **concerns,
    )


def main_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """What this rank's buffers have collected."""
    return {
        name: parameter.main_grad.clone()
        for prefix, module in trainer.pair.named()
        for name, parameter in ((f"{prefix}.{local}", one) for local, one in module.named_parameters())
    }


def proposal_logits(trainer: Trainer, micro_batch: MicroBatch) -> Tensor:
    """By the whole encoder, of which a hook takes the layer's output: without dropout."""
    main, kept = trainer.pair.main[0], []
    handle = main.block.layers[LAYER - 1].register_forward_hook(lambda _, arguments, output: kept.append(output[0]))
    main.eval()
    main(View(micro_batch.masked_tokens, replace(micro_batch, dropout_seed=None)))
    main.train()
    handle.remove()
    return trainer.parts.corruptor.head(kept[0], micro_batch, main.word).logits()[:, :VOCAB_SIZE]


def one_step() -> dict[str, Any]:
    """Gradients of phase 1 by the step and by autograd alone, and what is drawn."""
    trainer = start(config_of())
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    trainer.step._set_training(True)
    trainer.homes.begin_step()
    with trainer.homes.corrupting():
        proposals = trainer.step.propose(
            batch.micro_batches, batch, MetricSums(trainer.layout, trainer.parts.all_terms)
        )
    found: dict[str, Any] = {"gradients": main_gradients(trainer), "sampled": [one.sampled for one in proposals]}
    trainer.homes.begin_step()  # forgets these gradients
    found["scores"] = []
    for micro_batch in batch.micro_batches:
        logits, targets = proposal_logits(trainer, micro_batch), micro_batch.masked_targets
        with trainer.homes.corrupting():
            (functional.cross_entropy(logits, targets, reduction="sum") / batch.num_masked).backward()
        scores = logits.detach() + gumbel_noise(micro_batch.noise_keys, torch.arange(VOCAB_SIZE).int())
        scores[:, :NUM_SPECIALS] = -torch.inf
        found["scores"].append(scores.argmax(1))
    found["expected"] = main_gradients(trainer)
    trainer.close()
    return found


def test_proposals_and_gradients_are_those_of_a_head_on_the_layer() -> None:
    found = run_ranks(one_step, 1)[0]
    assert all(map(torch.equal, found["sampled"], found["scores"]))
    assert found["gradients"].keys() == found["expected"].keys()
    for name, expected in found["expected"].items():
        torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-5, atol=1e-7, msg=name)
    reached = {name for name, gradient in found["gradients"].items() if gradient.abs().max() > 0}
    assert "aux.dense.weight" in reached and "tied.word.weight" in reached and "tied.main_table.weight" in reached
    assert any(f"main0.block.layers.{LAYER - 1}." in name for name in reached)
    assert not any(f"main0.block.layers.{LAYER}." in name for name in reached)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["zero", "eval"])
def test_layouts_agree(mode: str) -> None:
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    (one,) = run_ranks(train_in_layouts, 1, [config_of(mode)])[0]
    (two,) = run_ranks(train_in_layouts, 2, [config_of(mode, parallel=split)])[0]
    assert not any(name.startswith("aux.block") for name in one.weights)
    for figures, same in zip(one.figures, two.figures, strict=True):
        assert same == pytest.approx(figures, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=0, atol=1e-6, msg=name)
