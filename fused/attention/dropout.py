"""The dropout of attention probabilities, with one mask for every operator, in kernels and in torch.

Legend: n samples, N heads of this rank, L positions of a sample, G groups of 8 neighbouring keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused.dispatch import jit, tl
from fused.philox import GROUP, check_dropout, drop_threshold, keep_mask, keep_mask_kernel, keep_scale

LONGEST = GROUP * 2**12
"""Keys that a counter tells apart: 12 of its bits are for their group, those above for the query."""


class Dropout(NamedTuple):
    """Rate in [0, 1), rounded to 2^-16; seed [1] int64; keys [n] int64 that name the samples; first head of this rank.

    A probability is dropped by (seed, key of its sample, head, query, key) and nothing else, so that packing, tiles
    and tensor parallelism do not change the mask.
    """

    rate: float
    seed: Tensor
    keys: Tensor
    first_head: int = 0

    @property
    def threshold(self) -> int:
        return drop_threshold(self.rate)

    @property
    def keep_scale(self) -> float:
        return keep_scale(self.threshold)


def checked_dropout(dropout: Dropout | None, samples: int, length: int, device: torch.device) -> Dropout | None:
    """The dropout, None where its rate is 0. Raises ValueError for the first part that does not fit."""
    if dropout is None:
        return None
    check_dropout(dropout.rate, dropout.seed, device)
    keys = dropout.keys
    if keys.shape != (samples,) or keys.dtype != torch.int64 or keys.device != device:
        raise ValueError(
            f"dropout.keys is {list(keys.shape)} {keys.dtype} on {keys.device}; "
            f"it must be [{samples}] torch.int64 on {device}"
        )
    if not 0 <= dropout.first_head < 2**31:
        raise ValueError(f"dropout.first_head is {dropout.first_head}; it must be in 0..2^31 - 1")
    if length > LONGEST:
        raise ValueError(f"samples have up to {length} positions; dropout takes at most {LONGEST}")
    return dropout if dropout.rate > 0.0 else None


@jit
def keep_kernel(seed, name, head, query, key_group, threshold):
    """Mask [..., 8 G] of the sample whose key is name, int64, and of a global head.

    query and key_group = key // 8 are int32 and broadcast to [..., G].
    """
    group = (query << 12) | key_group
    return keep_mask_kernel(seed, group, head, name.to(tl.int32), (name >> 32).to(tl.int32), threshold)


def keep(dropout: Dropout, num_heads: int, length: int) -> Tensor:
    """keep_kernel's mask [n, N, L, L] of (sample, head, query, key)."""
    query = torch.arange(length, device=dropout.keys.device)
    head = torch.arange(num_heads, device=query.device)[:, None] + dropout.first_head
    name = dropout.keys[:, None, None]
    return keep_mask(dropout.seed, dropout.threshold, length, head, name, name >> 32, first_group=query << 12)
