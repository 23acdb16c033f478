"""The linear layers of an encoder: megatron-core's, as torch's own where nothing is split, and Transformer Engine's."""

from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Module, functional

from fused.weight_gradient import add_weight_gradient


class ColumnLinear(ColumnParallelLinear):
    """Split over its outputs; on one tensor-parallel rank one product with its bias, in place of product and sum."""

    def forward(self, input_: Tensor, *given: object) -> tuple[Tensor, Tensor | None]:
        """[..., H] to [..., this rank's outputs]; the second is a bias that was left out."""
        if self.tp_group.size() > 1:
            return super().forward(input_, *given)
        return _linear(self, input_, self.bias), None


class RowLinear(RowParallelLinear):
    """Split over its inputs; its bias is left to the norm behind it."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., this rank's inputs] to [..., H], and the bias."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _linear(self, input_, None), self.bias


def _linear(layer: ColumnLinear | RowLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    # Without a wrapper that sums gradients up there is nothing to add to.
    if layer.gradient_accumulation_fusion and hasattr(layer.weight, "main_grad"):
        accumulated: Tensor = _AccumulatedLinear.apply(x, layer.weight, bias)
        return accumulated
    return functional.linear(x, layer.weight, bias)


class _AccumulatedLinear(torch.autograd.Function):
    """x W^T + b, whose backward adds the gradient of W to DDP's sum itself, as megatron-core's and Transformer Engine's
    do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        (x,), weight, rows = ctx.saved_tensors, ctx.weight, gradient.flatten(0, -2)
        add_weight_gradient(x.flatten(0, -2), rows, weight.main_grad)
        # DDP's hook, which counts complete gradients, wants one, and drops it where this mark is set.
        weight.grad_added_to_main_grad = True
        return gradient @ weight, torch.empty_like(weight), rows.sum(0) if ctx.has_bias else None


TRANSFORMER_ENGINE: tuple[type[Module], ...] = ()
"""Transformer Engine's, split over outputs and over inputs; none where it is not installed.

Parameters, their marks and their parts of a checkpoint are those of the two above.
"""
if transformer_engine.HAVE_TE:
    TRANSFORMER_ENGINE = (transformer_engine.TEColumnParallelLinear, transformer_engine.TERowParallelLinear)
