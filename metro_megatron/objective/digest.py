"""A number that certifies what a step has read: documents, order, masks and replacements.

It is the sum modulo 2^64, over the masked positions, of a hash of the position's noise key (seed, epoch, sample,
position) and of the id that stands there for main. A sum has no order, so that layouts, rows, micro batches and
interruptions do not change it; one other id does, but for one case in 2^64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metro_megatron.data.views import View

CHUNKS, BITS = 4, 16
"""Summed in parts that FP64 sums hold exactly for 2^37 positions."""
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""0x9E3779B97F4A7C15, and the multipliers of SplitMix64, as signed numbers."""


def digest_parts(view: View) -> Tensor:
    """[CHUNKS] sums of a micro batch, lowest bits first."""
    high, low = view.micro_batch.noise_keys.long().unbind(1)
    ids = view.tokens.t().reshape(-1)[view.micro_batch.masked_index]
    hashed = (high << 32 | low & 0xFFFFFFFF) ^ ids * _ODD[0]
    for shift, factor in zip((30, 27), _ODD[1:], strict=True):
        hashed = (hashed ^ _shifted(hashed, shift)) * factor
    hashed = hashed ^ _shifted(hashed, 31)
    shifts = torch.arange(0, CHUNKS * BITS, BITS, device=hashed.device)
    return (hashed[:, None] >> shifts & (1 << BITS) - 1).sum(0)


def digest(parts: Tensor) -> int:
    """The number that sums of parts, [CHUNKS], make."""
    return sum(int(part) << BITS * number for number, part in enumerate(parts)) % 2**64


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted to the right without the sign, which torch's shift would repeat."""
    return bits >> by & (1 << 64 - by) - 1
