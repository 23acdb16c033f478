"""Parts of a layer that backward makes again, so that forward need not keep them (parallel.recompute selective)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

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
    before that product where it is torch's own; one of megatron-core's on several tensor-parallel ranks, or of
    Transformer Engine, saves behind its product and repeats it. A function drops by keys, not by a generator whose
    state would have to be restored.
    """
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class _View(NamedTuple):
    """What a product saves of a tensor that is made again."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def remade(
    config: TransformerConfig,
    module: RecomputeModule,
    make: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Result],
    x: Tensor,
) -> Result:
    """product(make(x)), which keeps x in place of make(x) where config.recompute_modules names the module.

    make is without dropout and costs little; whoever's product it is, it is not repeated.
    """
    made = make(x)
    if module not in config.recompute_modules or not torch.is_grad_enabled():
        return product(made)
    source, storage = x.detach(), made.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | _View:
        if saved.untyped_storage()._cdata != storage:
            return saved
        return _View(saved.size(), saved.stride(), int(saved.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(source).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return product(made)
