"""Every objective in a real step against the papers' formulas, written once more from logits at all positions.

Values and every gradient in float64, on the unsharded transformers model; then the same steps over tp 2 x pp 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fused.linear_cross_entropy import gumbel_noise
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.objective.terms import main_terms
from metro_megatron.randomness import Purpose, hash64
from metro_megatron.vocabulary import BOS_ID, NUM_SPECIALS, PAD_ID
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, run_steps, small_config, start, whole_weights
from tests.parity.test_gradients import OneStep, one_step

OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked language modelling": {
        "main": ["mlm"],
        "mask_probability": 0.4,
        "keep_probability": 0.1,
        "random_probability": 0.1,
    },
    "detection alone": {"main": ["rtd"]},
    "replace MLM": {"main": ["clm"], "clm_weight": 2.0},
    "weighted": {"main": ["clm", "rtd"], "clm": "weighted", "rtd_weight": 0.0},
    "mixture": {"main": ["rtd", "clm"], "clm": "mixture", "rtd_weight": 0.0},
    "cloze": {"main": ["cloze"]},
    "contrast": {"main": ["scl"], "scl_weight": 3.0, "scl_temperature": 0.3, "scl_crop": 0.7},
}
SCL_HEAD = tuple(f"main.scl_head.{part}.{kind}" for part in ("dense", "norm") for kind in ("weight", "bias"))


def configured(objective: dict[str, Any], **concerns: dict[str, Any]) -> Config:
    source = "none" if objective["main"] == ["mlm"] else "auxiliary"
    return small_config(objective=objective, corruption={"source": source}, **concerns)


def one_steps(configs: list[Config]) -> list[OneStep]:
    return [one_step(config) for config in configs]


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[Config, OneStep]]:
    rows = {"row_format": "padded", "micro_batch_size": 24}
    configs = [configured(objective, data=rows) for objective in OBJECTIVES.values()]
    return dict(zip(OBJECTIVES, zip(configs, run_ranks(one_steps, 1, configs)[0], strict=True), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_every_gradient_are_the_formula_s(name: str, steps: dict[str, tuple[Config, OneStep]]) -> None:
    config, step = steps[name]
    has_auxiliary = config.corruption.source == "auxiliary"
    model_config = config.model if has_auxiliary else replace(config.model, auxiliary_num_layers=0)
    objectives = [term.name for term in main_terms(config)]
    model = MetroForPreTraining(metro_config(model_config, objectives))
    model.load_state_dict(hf_state_dict(step.weights, model_config, objectives))
    model.double().train()
    head = {name: step.weights[name].double().requires_grad_() for name in SCL_HEAD if name in step.weights}

    losses = {name: loss for name, loss in formulas(config, model, head, step).items() if loss is not None}
    assert losses.keys() == {"aux", *objectives} if has_auxiliary else {"mlm"}
    options = config.objective
    weights = {
        "aux": 1.0, "mlm": 1.0, "rtd": options.rtd_weight, "clm": options.clm_weight,
        "cloze": options.cloze_weight, "scl": options.scl_weight,
    }  # fmt: skip
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()

    for name, loss in losses.items():
        assert step.figures[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-5), name
    ours = hf_state_dict(step.gradients, model_config, objectives)  # linear: it maps gradients as it maps weights
    ours |= {name: step.gradients[name] for name in head}
    theirs = dict(model.named_parameters()) | head
    assert theirs.keys() == {name for name in ours if not name.endswith("decoder.weight")}
    # Contrast is a difference of nearly equal cosines in fp32, as all samples' states are alike at the start.
    tolerance = 2e-3 if "scl" in losses else 3e-5
    for name, parameter in theirs.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (ours[name].double() - expected).norm()
        if name.endswith("key.bias"):  # softmax does not see it: its gradient is zero but for rounding
            assert expected.norm() < 1e-12 and error < 1e-4, (name, error)
        else:
            assert error <= tolerance * expected.norm(), (name, error, expected.norm())
    if options.clm != "simplified":
        assert not step.gradients["main.rtd_head.weight"].any(), "the correction reaches the logit of detection"


def formulas(
    config: Config, model: MetroForPreTraining, scl_head: Mapping[str, Tensor], step: OneStep
) -> dict[str, Tensor | None]:
    """Means as METRO's equations and COCO-LM's text have them, one sample a row."""
    batch, objective = step.batch, config.objective
    is_masked = batch.is_masked
    targets = batch.tokens[is_masked]
    output = model(batch.masked_tokens, batch.is_real, noised_input_ids=step.corrupted)
    if objective.main == ["mlm"]:
        assert torch.equal(step.corrupted, batch.masked_tokens)
        return {"mlm": functional.cross_entropy(output.mlm_logits[is_masked], targets)}
    is_original = step.corrupted == batch.tokens
    found: dict[str, Tensor | None] = {
        "aux": functional.cross_entropy(output.mlm_logits[is_masked], targets),
        "rtd": None,
        "clm": None,
        "cloze": None,
        "scl": None,
    }
    if "rtd" in objective.main:
        found["rtd"] = functional.binary_cross_entropy_with_logits(
            output.rtd_logits[batch.is_real], is_original[batch.is_real].double()
        )
    if "clm" in objective.main:
        p = output.clm_logits[is_masked].softmax(-1).gather(1, targets[:, None])[:, 0]
        losses = -p.log()
        if objective.clm != "simplified":
            copying = output.rtd_logits[is_masked].detach().sigmoid()
            mixed = is_original[is_masked] * copying + (1 - copying) * p
            losses = -mixed.log() if objective.clm == "mixture" else (1 - copying) * losses
        found["clm"] = losses.mean()
    if "cloze" in objective.main:
        scores = output.cloze_logits[is_masked]
        offered = torch.cat([targets[:, None], distractors(output.mlm_logits, batch)], dim=1)
        is_input = offered == step.corrupted[is_masked][:, None]
        assert bool(is_input.any(1).all()), "main reads one of the candidates"
        found["cloze"] = -scores.gather(1, offered).log_softmax(-1)[:, 0].mean()
    if "scl" in objective.main:
        cropped, is_real = crops(batch, objective.scl_crop, config.train.seed)
        states = torch.cat([output.last_hidden_state[:, 0], model.metro(cropped, is_real).last_hidden_state[:, 0]])
        weight, bias, scale, shift = (scl_head[name] for name in SCL_HEAD)
        states = functional.gelu(states @ weight.t() + bias)
        states = functional.layer_norm(states, states.shape[1:], scale, shift, config.model.layer_norm_eps)
        cosines = functional.cosine_similarity(states[:, None], states[None], dim=-1) / objective.scl_temperature
        is_self = torch.eye(len(states), dtype=torch.bool)
        partners = torch.arange(len(states)).roll(len(states) // 2)
        found["scl"] = functional.cross_entropy(cosines.masked_fill(is_self, -torch.inf), partners)
    return found


def distractors(logits: Tensor, batch: MicroBatch) -> Tensor:
    """[M, 2] the two words other than the original of the largest perturbed logits, row by row of the batch."""
    rows = len(batch.tokens)
    index = [(i % rows, i // rows) for i in batch.masked_index.tolist()]
    places = dict(zip(index, batch.noise_keys, strict=True))
    found = []
    for place in sorted(places):
        words = torch.arange(NUM_SPECIALS, logits.size(-1))
        noise = gumbel_noise(places[place][None], words.int())[0]
        order = words[(logits.detach()[place][words] + noise).argsort(descending=True)]
        found.append(order[order != batch.tokens[place]][:2])
    return torch.stack(found)


def crops(batch: MicroBatch, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Crops of the original rows of the first epoch, and where they have tokens."""
    rows = []
    for ids, length, sample in zip(batch.tokens.tolist(), batch.sample_lengths.tolist(), batch.sample_ids, strict=True):
        size = max(1, int(share * length))
        begin = (int(hash64(seed, Purpose.CROP, 0, int(sample))) >> 1) % (length - size + 1)
        row = [BOS_ID] * (begin > 0) + ids[begin : begin + size]
        rows.append(row + [PAD_ID] * (len(ids) - len(row)))
    tokens = torch.tensor(rows)
    assert len({row.index(PAD_ID) for row in rows}) > 3
    return tokens, tokens != PAD_ID


EVERYTHING = {"main": ["rtd", "clm", "cloze", "scl"], "clm": "mixture"}
WEIGHTED = {"main": ["rtd", "clm"], "clm": "weighted"}
PLAIN = {"main": ["mlm"]}


def two_steps(configs: list[Config]) -> list[tuple[list[Figures], dict[str, Tensor]]]:
    """On every rank: figures of two steps of each configuration, and the weights after them."""
    found = []
    for config in configs:
        trainer = start(config)
        figures, _ = run_steps(trainer, 0, 2)
        trainer.homes.fetch_parameters()
        found.append((figures, whole_weights(trainer)))
        trainer.close()
    return found


def test_layouts_equal_one_process() -> None:
    objectives = (EVERYTHING, WEIGHTED, PLAIN)
    rows = {"micro_batch_tokens": 256}  # four in both layouts: contrast is among the samples of one
    split = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    alone = run_ranks(two_steps, 1, [configured(one, data=rows) for one in objectives])[0]
    together = run_ranks(two_steps, 4, [configured(one, data=rows, parallel=split) for one in objectives])[0]
    for (figures, weights), (expected, wanted) in zip(together, alone, strict=True):
        for found, one in zip(figures, expected, strict=True):
            assert found == pytest.approx(one, rel=1e-5)
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=name)
    assert {name for name in together[0][0][0] if name.endswith("_loss")} == {
        f"{name}_loss" for name in ("aux", *EVERYTHING["main"])
    }
