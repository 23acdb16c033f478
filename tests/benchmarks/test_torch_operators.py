"""torch's own operators, the baseline of Table 5, compute what ours do where nothing is dropped."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks.torch_operators import (
    attention,
    attention_qkvpacked,
    fused_alone,
    layer_norm,
    vocabulary_statistics,
)
from fused.attention import CompactBias, packed_samples, padded_samples
from fused.attention import attention as our_attention
from fused.layer_norm import layer_norm as our_layer_norm
from fused.linear_cross_entropy import Sampling
from metro_megatron.config.schema import Config, ModelConfig
from metro_megatron.model import attention as attention_module
from metro_megatron.model import norm as norm_module
from metro_megatron.model.heads import Decoding
from metro_megatron.objective import vocabulary as vocabulary_module
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, run_steps, small_config, start

HEADS, DIM = 2, 8


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and all gradients."""
    shown = []
    for function in (one, other):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        gradients = torch.autograd.grad(value, leaves, normal(*value.shape, seed=2))
        shown.append([value.detach(), *gradients])
    for got, wanted in zip(*shown, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_layer_norm() -> None:
    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, residual, weight, bias, x_bias: function(
            x, weight, bias, 1e-5, residual=residual, x_bias=x_bias
        )

    inputs = [normal(6, 16, seed=3), normal(6, 16, seed=4), *(normal(16, seed=seed) for seed in (5, 6, 7))]
    assert_equal(of(layer_norm), of(our_layer_norm), *inputs)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("reach", [3, 20])
def test_attention(is_packed: bool, reach: int) -> None:
    lengths = torch.tensor([9, 1, 5])
    packed = packed_samples(torch.tensor([0, 9, 10, 15]), 9)
    samples, tokens = (packed, 15) if is_packed else (padded_samples(lengths, 9), 27)
    # What stands at padding is not compared: nothing reads it.
    is_real = torch.ones(tokens) if is_packed else (torch.arange(9)[:, None] < lengths).flatten().float()

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, distances, cls: (
            function(q, k, v, CompactBias(distances, cls), samples) * is_real[:, None, None]
        )

    inputs = [normal(tokens, HEADS, DIM, seed=seed) for seed in (3, 4, 5)]
    bias = [normal(HEADS, 2 * reach + 1, seed=6), normal(HEADS, 2, seed=7)]
    assert_equal(of(attention), of(our_attention), *inputs, *bias)


def test_one_operator_alone_is_ours_and_all_come_back() -> None:
    places = [
        ("layer_norm", norm_module, "layer_norm", layer_norm),
        ("attention", attention_module, "attention", attention),
        ("attention", attention_module, "attention_qkvpacked", attention_qkvpacked),
        ("linear_cross_entropy", vocabulary_module, "vocabulary_statistics", vocabulary_statistics),
    ]
    before = [getattr(module, name) for _, module, name, _ in places]
    for alone in ("", "layer_norm", "attention", "linear_cross_entropy", "softmax_dropout"):
        kept = "attention" if alone == "softmax_dropout" else alone
        with fused_alone(alone):
            for operator, module, name, function in places:
                assert (getattr(module, name) is function) == (operator != kept), (alone, operator)
        assert [getattr(module, name) for _, module, name, _ in places] == before


CHECKS = tuple(
    f"fused.{name}"
    for name in ("attention.operator._checked", "layer_norm.operator._check", "linear_cross_entropy.operator._check")
)
"""What every call of our operators begins with."""


def trained(configs: list[Config]) -> list[tuple[list[Figures], list[Figures]]]:
    """Of each configuration, figures of three steps with our operators, and with torch's: no other is called then."""
    shown = []
    for config in configs:
        figures = []
        for context, ours in ((nullcontext(), ()), (fused_alone(""), CHECKS)):
            trainer = start(config)
            with context, ExitStack() as stack:
                for check in ours:
                    stack.enter_context(patch(check, side_effect=AssertionError(check)))
                figures.append(run_steps(trainer, 0, 3)[0])
            trainer.close()
        shown.append((figures[0], figures[1]))
    return shown


def test_steps_have_the_same_losses() -> None:
    """Replacements that need no model are the same in both; those of an auxiliary are other draws."""
    configs = [small_config(corruption={"source": "uniform"}), small_config()]
    ((uniform, auxiliary),) = run_ranks(trained, 1, configs)
    for ours, torchs in zip(*uniform, strict=True):
        assert ours.keys() == torchs.keys()
        assert all(torchs[name] == pytest.approx(value, rel=2e-5, abs=1e-6) for name, value in ours.items())
    ours, torchs = auxiliary
    assert torchs[0]["aux_loss"] == pytest.approx(ours[0]["aux_loss"], rel=1e-5)
    assert torchs[2]["clm_loss"] == pytest.approx(ours[2]["clm_loss"], rel=0.02)


class OneRank:
    def size(self) -> int:
        return 1


def test_samples_follow_the_logits() -> None:
    rows, weight = torch.ones(4000, 1), torch.zeros(9, 1)
    weight[6] = 2.0
    targets, keys = torch.full((4000,), 6), torch.zeros(4000, 2, dtype=torch.int32)
    decoding = Decoding(rows, weight, torch.zeros(9))
    group: object = OneRank()
    found = vocabulary_statistics(decoding, targets, ModelConfig(vocab_size=8), group, Sampling(keys))  # type: ignore[arg-type]
    assert found.sampled is not None
    counts = found.sampled.bincount(minlength=9)
    # Ids 0 to 4 are special, id 8 only pads the table.
    assert counts[:5].sum() == counts[8] == 0
    share = torch.tensor(2.0).exp() / (2 + torch.tensor(2.0).exp())
    assert counts[6] / 4000 == pytest.approx(share.item(), abs=0.03)
    others = vocabulary_statistics(
        decoding, targets, ModelConfig(vocab_size=8), group, Sampling(keys, disallow_correct=True)
    )  # type: ignore[arg-type]
    assert others.sampled is not None and not (others.sampled == 6).any() and (found.predicted == 6).all()
