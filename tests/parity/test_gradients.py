"""Every gradient of the step against torch's autograd through the unsharded transformers model."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.heads_metro import tied_weights
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.model.init import global_parameters
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.hf.pair import VARIANTS
from tests.parity.small_run import Figures, small_config, start, whole_weights


@dataclass
class OneStep:
    """The first step of a run with a single micro batch of padded rows."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    batch: MicroBatch
    corrupted: Tensor
    figures: Figures
    num_masked: int
    num_tokens: int


def one_step(config: Config) -> OneStep:
    """On a single rank: gradients of all parameters, before the optimizer uses them."""
    trainer = start(config)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    (micro_batch,) = batch.micro_batches
    weights = whole_weights(trainer)
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    (corrupted,) = trainer.step.evaluate(batch, metrics)
    figures = metrics.reduce()
    trainer.optimizer.step = lambda step, *others: None  # type: ignore[method-assign,assignment]
    trainer.step.train(batch, metrics)
    gradients = {
        name: parameter.main_grad.clone()  # type: ignore[attr-defined]
        for prefix, module in trainer.pair.modules()
        for name, parameter in global_parameters(module, prefix)
    }
    trainer.close()
    return OneStep(weights, gradients, micro_batch, corrupted, figures, batch.num_masked, batch.num_tokens)


def first_steps(configs: list[Config]) -> list[OneStep]:
    return [one_step(config) for config in configs]


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[Config, OneStep]]:
    """The first step of every variant of the model."""
    configs = [
        small_config(
            model=changes,
            data={"row_format": "padded", "micro_batch_size": 24},
            train={"global_batch_size": 24},
        )
        for changes in VARIANTS.values()
    ]
    (found,) = run_ranks(first_steps, 1, configs)
    return dict(zip(VARIANTS, zip(configs, found, strict=True), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_gradient_equals_autograd(steps: dict[str, tuple[Config, OneStep]], name: str) -> None:
    """eq. 7 + eq. 9 written once more from logits at all positions, in float64.

    What both encoders share is one parameter there, whose gradient is the sum of all its uses.
    """
    config, step = steps[name]
    model = MetroForPreTraining(metro_config(config.model))
    model.load_state_dict(hf_state_dict(step.weights, config.model))
    model.double().train()

    batch = step.batch
    output = model(batch.masked_tokens, batch.is_real, noised_input_ids=step.corrupted)
    is_masked = batch.masked_tokens != batch.tokens
    assert int(is_masked.sum()) == step.num_masked and int(batch.is_real.sum()) == step.num_tokens
    targets = batch.tokens[is_masked]
    is_original = (step.corrupted == batch.tokens).double()
    mlm = functional.cross_entropy(output.mlm_logits[is_masked], targets)
    clm = functional.cross_entropy(output.clm_logits[is_masked], targets)
    rtd = functional.binary_cross_entropy_with_logits(output.rtd_logits[batch.is_real], is_original[batch.is_real])
    (mlm + 50 * rtd + clm).backward()

    assert step.figures["aux_loss"] == pytest.approx(mlm.item(), rel=1e-5)
    assert step.figures["rtd_loss"] == pytest.approx(rtd.item(), rel=1e-5)
    assert step.figures["clm_loss"] == pytest.approx(clm.item(), rel=1e-5)
    ours = hf_state_dict(step.gradients, config.model)  # linear: it maps gradients as it maps weights
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    tied = tied_weights(config.model.shared_embeddings, config.model.shared_lm_bias, ("auxiliary", "rtd", "clm"))
    assert {tied.get(name, name) for name in theirs} == set(ours) - set(tied)
    for name, expected in theirs.items():
        assert expected is not None, name
        error = (ours[name].double() - expected).norm()
        if expected.norm() < 1e-12:  # softmax does not see it: its gradient is zero but for rounding
            assert name.endswith("key.bias") and error < 1e-4, (name, error)
        else:
            assert error < 3e-5 * expected.norm(), (name, error / expected.norm())


def test_replacements_differ_only_at_masked_positions(steps: dict[str, tuple[Config, OneStep]]) -> None:
    _, step = steps["METRO"]
    is_masked = step.batch.masked_tokens != step.batch.tokens
    assert torch.equal(step.corrupted[~is_masked], step.batch.tokens[~is_masked])
    changed = (step.corrupted != step.batch.tokens).sum().item()
    assert step.figures["replace_rate"] == pytest.approx(changed / step.num_tokens)
