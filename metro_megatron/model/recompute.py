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

    A function ends with the matrix product that reads what is not kept. torch makes again what was saved, and stops
    before that product where it is torch's own; one of megatron-core's on several tensor-parallel ranks saves behind
    its product and repeats it. A function drops by keys, not by a generator whose state would have to be restored.
    """
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def remade(
    config: TransformerConfig,
    module: RecomputeModule,
    make: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    x: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """product(make(x)), which keeps x in place of make(x) where config.recompute_modules names the module.

    make is without dropout and costs little; the product is not repeated. What it has saved loses its
    memory until its backward begins (as in megatron-core's CheckpointWithoutOutput).
    """
    made = make(x)
    result, bias = product(made)
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return result, bias
    source, emptied = x.detach(), [made.untyped_storage()]
    size = emptied[0].nbytes()
    emptied[0].resize_(0)

    def refill(gradient: Tensor) -> None:
        storage = emptied.pop()  # no longer held here: backward frees it
        with torch.no_grad():
            again = make(source).untyped_storage()
        storage.resize_(size)
        storage.copy_(again)

    result.register_hook(refill)
    return result, bias
