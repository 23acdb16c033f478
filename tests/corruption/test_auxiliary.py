"""The trained auxiliary: how its dropout, temperature and forbidden targets shape what it draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fused.linear_cross_entropy import gumbel_noise
from metro_megatron.config.schema import Config
from metro_megatron.model.sequences import sequences_of
from metro_megatron.vocabulary import NUM_SPECIALS
from tests.distributed import run_ranks
from tests.parity.small_run import VOCAB_SIZE, small_config, start, train_in_layouts

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
COOLING = {"temperature_schedule": "linear", "temperature": 2.0, "final_temperature": 1.0}


def config_of(mode: str, **concerns: dict[str, Any]) -> Config:
    return small_config(model={**DROPOUT, "auxiliary_dropout": mode}, **concerns)


@dataclass
class Drawn:
    """What a corruptor said of the first micro batch of step 3, and what its model says of it in either mode."""

    sampled: Tensor
    loss: float
    logits: dict[str, Tensor]
    keys: Tensor
    targets: Tensor
    evaluated: Tensor


def drawn(configs: list[Config]) -> list[Drawn]:
    found = []
    for config in configs:
        trainer = start(config)
        batch = replace(trainer.corpus.training_data(trainer.layout).step_batch(0, 0), step=3)
        micro_batch = replace(batch.micro_batches[0], dropout_seed=torch.tensor([12345]))
        corruptor = trainer.parts.corruptor
        model = corruptor.trained["aux"]
        model.train()
        proposal = corruptor.propose(micro_batch, batch, lambda loss: loss)
        assert model.training, "the mode is as it was"
        logits = {}
        with torch.no_grad():
            for mode in ("train", "eval"):
                model.train(mode == "train")
                logits[mode] = model(micro_batch).logits()[:, :VOCAB_SIZE]
            evaluated = corruptor.propose(replace(micro_batch, dropout_seed=None), batch, lambda loss: loss).sampled
        found.append(
            Drawn(
                proposal.sampled,
                float(proposal.sums["aux_loss"]),
                logits,
                micro_batch.noise_keys,
                micro_batch.masked_targets,
                evaluated,
            )
        )
        trainer.close()
    return found


def expected(logits: Tensor, one: Drawn, temperature: float = 1.0, disallow_correct: bool = False) -> Tensor:
    scores = logits + temperature * gumbel_noise(one.keys, torch.arange(VOCAB_SIZE, dtype=torch.int32))
    scores[:, :NUM_SPECIALS] = -torch.inf
    return scores.scatter(1, one.targets[:, None], -torch.inf).argmax(1) if disallow_correct else scores.argmax(1)


def test_each_mode_samples_from_its_pass_and_learns_from_the_other_as_said() -> None:
    modes = ("zero", "train", "eval")
    for mode, one in zip(modes, run_ranks(drawn, 1, [config_of(mode) for mode in modes])[0], strict=True):
        assert torch.equal(one.logits["train"], one.logits["eval"]) == (mode == "zero"), mode
        sampling, learning = ("eval", "train") if mode == "eval" else ("train", "train")
        assert torch.equal(one.sampled, expected(one.logits[sampling], one)), mode
        loss = functional.cross_entropy(one.logits[learning], one.targets, reduction="sum")
        assert one.loss == pytest.approx(float(loss), rel=1e-6), mode
        assert torch.equal(one.evaluated, expected(one.logits["eval"], one)), mode


def test_temperature_is_that_of_the_step_and_evaluations_draw_at_the_last() -> None:
    cooling = {**COOLING, "disallow_correct": True}
    (one,) = run_ranks(drawn, 1, [small_config(corruption=cooling, train={"train_steps": 6})])[0]
    logits = one.logits["eval"]
    assert torch.equal(
        one.sampled, expected(logits, one, temperature=1.5, disallow_correct=True)
    )  # half of the run is done
    assert torch.equal(one.evaluated, expected(logits, one, temperature=1.0, disallow_correct=True))
    assert not (one.sampled == one.targets).any() and not torch.equal(one.sampled, one.evaluated)
    loss = functional.cross_entropy(logits, one.targets, reduction="sum")
    assert one.loss == pytest.approx(float(loss), rel=1e-6), "the loss stays at temperature 1"


def seeds() -> tuple[set[int], set[int]]:
    trainer = start(config_of("train"))
    micro_batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0).micro_batches[0]
    keys: list[set[int]] = []

    def remember(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keys.append(set(kwargs["packed_seq_params"].dropout.seeds[:, 0].tolist()))

    seed = torch.tensor([(1 << 62) - 1000])  # of a step: almost the largest
    trainer.parts.corruptor.trained["aux"].block.register_forward_pre_hook(remember, with_kwargs=True)
    trainer.parts.corruptor.trained["aux"](replace(micro_batch, dropout_seed=seed))
    main = sequences_of(replace(micro_batch, dropout_seed=seed * 0), 64, None)
    trainer.close()
    return keys[0], set(main.dropout.seeds[:, 0].tolist())


def test_no_mask_of_the_auxiliary_is_one_of_main() -> None:
    auxiliary, main = run_ranks(seeds, 1)[0]
    assert len(auxiliary) == 7 and max(auxiliary) < min(main)


def test_layouts_agree() -> None:
    """tp 2 x pp 2 against one process: dropout in the auxiliary, one pass and two, while the temperature falls."""
    concerns = [
        (mode, {"corruption": {**COOLING, "temperature_schedule": "exponential"}}) for mode in ("train", "eval")
    ]
    split = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    one = run_ranks(train_in_layouts, 1, [config_of(mode, **rest) for mode, rest in concerns])[0]
    four = run_ranks(train_in_layouts, 4, [config_of(mode, parallel=split, **rest) for mode, rest in concerns])[0]
    for alone, together in zip(one, four, strict=True):
        for figures, same in zip(alone.figures, together.figures, strict=True):
            assert same == pytest.approx({**figures, "non_pad_fraction": same["non_pad_fraction"]}, rel=1e-5)
    assert one[0].figures[-1]["clm_loss"] != one[1].figures[-1]["clm_loss"], "the modes draw from different passes"
