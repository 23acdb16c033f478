"""Parts of a layer that backward makes again, so that forward need not keep them (parallel.recompute selective)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metro_megatron.config.schema import RecomputeModule

Result = TypeVar("Result")


def same(x: Tensor) -> Tensor:
    """Where no norm stands before a matrix: post-LN."""
    return x


def recomputed(
    config: TransformerConfig, module: RecomputeModule, function: Callable[..., Result], *inputs: Tensor | None
) -> Result:
    """function(*inputs), of which only the inputs are kept where config.recompute_modules names the module.

    A function ends with the matrix product that reads what is not kept: torch makes again what was saved, and stops
    before the product itself. It drops by keys, not by a generator whose state would have to be restored.
    """
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
