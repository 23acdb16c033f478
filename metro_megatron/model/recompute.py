"""Parts of a layer that backward makes again, so that forward need not keep them (parallel.recompute selective)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from metro_megatron.config.schema import RecomputeModule


def same(x: Tensor) -> Tensor:
    """Where no norm stands before a matrix: post-LN."""
    return x


def remade(
    config: TransformerConfig,
    module: RecomputeModule,
    make: Callable[..., Tensor],
    product: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    *inputs: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """product(make(*inputs)), of which only the inputs are kept where config.recompute_modules names the module.

    Backward makes again what make gave and kept; the product, which nobody's linear layer repeats, stands outside: what
    it saved loses its memory until its backward begins. torch's own checkpoint would hand linear layers a copy of their
    weight in backward, without the marks by which they find the gradients' sums. make drops by keys, no generator.
    """
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return product(make(*inputs))
    # None, not False, is how it is told to do without FP8, for which it needs Transformer Engine.
    making = CheckpointWithoutOutput(fp8=config.fp8)
    result, bias = product(making.checkpoint(make, *inputs))
    making.discard_output_and_register_recompute(result)
    return result, bias
