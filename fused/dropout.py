"""Counter-based dropout masks: Philox-4x32-10 (Salmon et al., 2011), equal in kernels and in torch.

A mask is never stored: backward draws it again. One call of Philox gives 128 bits, which serve GROUP neighbouring
elements with 16 bits each: about 60 integer operations a call, by count as many as an H100 has time for while it reads
and writes one element. The generator comes first, then masks of rows and columns, then those of attention.

Legend: n samples, N heads of this rank, L positions of a sample, G groups of 8 neighbouring columns or keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused.dispatch import jit, tl

GROUP = 8
"""Elements of one call: 128 bits by 16. With 32 bits an element, as is usual, a call would serve 4 and dropout cost
twice as much; 16 bits round a rate to 2^-16, which for 0.1 changes it by 6e-6."""

LEVELS = 2**16
"""What an element's 16 bits can be."""

MOST_POSITIONS = GROUP * 2**12
"""Keys that attention's counter tells apart: 12 of its 32 bits are for their group, those above for the query."""

CACHED = 2**16
"""Counters whose arrays, a handful of 8 bytes each, fit into the cache of a processor's core."""

_WORD = 0xFFFFFFFF


def check_dropout(rate: float, seed: Tensor, device: torch.device) -> None:
    """Raise ValueError for a rate outside [0, 1), and for a seed that is not [1] int64 on this device."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout is {rate}; it must be in [0, 1)")
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed is {list(seed.shape)} {seed.dtype} on {seed.device}; it must be [1] torch.int64 on {device}"
        )


def drop_threshold(rate: float) -> int:
    """16 random bits below it drop an element: rate rounded to 2^-16."""
    return min(round(rate * LEVELS), LEVELS - 1)  # a rate that rounds to 1 would keep nothing, and divide by 0 below


def keep_scale(threshold: int) -> float:
    """What kept elements are multiplied with; the inverse of the rounded rate, so that the mean is exact."""
    return LEVELS / (LEVELS - threshold)


def philox(seed: Tensor, *counters: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32-10, in int64; seed is int64, up to four counters below 2^32 broadcast.

    Counters may be negative int32 values too; missing ones are 0. They broadcast as the rounds mix them.
    """
    # int64 holds every unsigned 32-bit word as itself, so that `& _WORD` is all that wrapping takes.
    given = [torch.as_tensor(x, device=seed.device) & _WORD for x in counters]
    given += [torch.zeros_like(seed)] * (4 - len(given))
    c0, c1, c2, c3 = given
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    # Ten rounds are the authors' choice, with a margin over the 7 that pass BigCrush, and what tl.philox does; so do
    # the multipliers and the key's increments, 2^32 times (sqrt(5) - 1) / 2 and sqrt(3) - 1, which must not change.
    for _ in range(10):
        # int64 holds the 64 bits of a product of 32-bit words, whatever its sign. Only what is multiplied again must be
        # free of higher bits.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b, (a >> 32) ^ c3 ^ k1, a
        c0 &= _WORD
        c2 &= _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


@jit
def keep_mask_kernel(seed, group, c1, c2, c3, threshold):
    """Mask of GROUP elements for each counter in group [..., G] int32: [..., 8 G], elements of a group together.

    c1, c2, c3: int32 scalars, or tensors that broadcast against group. seed: int64 scalar.
    """
    zero = group * 0  # tl.philox takes four counters of one shape
    a, b, c, d = tl.philox(seed, group, zero + c1, zero + c2, zero + c3)
    # One word is two elements, its low half first. Joining adds a last dimension of 2; joined crosswise, a with c and b
    # with d, the words come out in their order, and their halves innermost: [..., G, 2, 2, 2].
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [..., G, 2, 2]: a, b, c, d
    bits = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    # A group's 8 elements end up in neighbouring columns, but in one thread's registers, from where the compiler moves
    # the mask to the layout of what it masks. 8 is GROUP.
    return tl.reshape(bits, group.shape[:-1] + [group.shape[-1] * 8]) >= threshold


def keep_mask(
    seed: Tensor, threshold: int, columns: int, *counters: Tensor | int, first_group: Tensor | int = 0
) -> Tensor:
    """keep_mask_kernel's mask [..., columns] for groups first_group, first_group + 1, ... and counters c1, c2, c3.

    first_group and counters broadcast to [...]; seed is [1].
    """
    # Whole groups are drawn and the last one is cut, as the kernels do with lanes beyond a row's end.
    group = torch.arange(-(-columns // GROUP), device=seed.device)
    given = torch.broadcast_tensors(*(torch.as_tensor(x, device=seed.device) for x in (first_group, *counters)))
    rows = [x.reshape(-1, 1) for x in given]
    kept = torch.empty(len(rows[0]), len(group), GROUP, dtype=torch.bool, device=seed.device)
    # On the CPU some rows at a time, which stay in the second-level cache over the many passes.
    size = max(1, CACHED // len(group)) if seed.device.type == "cpu" else max(1, len(kept))
    for part, first, *others in zip(*(x.split(size) for x in (kept, *rows)), strict=True):
        words = torch.stack([word.int() for word in philox(seed, first + group, *others)], dim=-1)
        # Halves of words, the low one first, as signed numbers in the order of the unsigned ones.
        halves = words.view(torch.int16) ^ -(LEVELS // 2)
        torch.ge(halves, threshold - LEVELS // 2, out=part)
    return kept.view(*given[0].shape, len(group) * GROUP)[..., :columns]


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
    if length > MOST_POSITIONS:
        raise ValueError(f"samples have up to {length} positions; dropout takes at most {MOST_POSITIONS}")
    return dropout if dropout.rate > 0.0 else None


@jit
def keep_kernel(seed, name, head, query, key_group, threshold):
    """Mask [..., 8 G] of the sample whose key is name, int64, and of a global head.

    query and key_group = key // 8 are int32 and broadcast to [..., G].
    """
    # 32 bits for query and key: key_group < 2^12 and query < 2^15 (MOST_POSITIONS). The head and the two halves of the
    # sample's key fill the other three counters; what is left, (run, step, module), is the seed.
    group = (query << 12) | key_group
    return keep_mask_kernel(seed, group, head, name.to(tl.int32), (name >> 32).to(tl.int32), threshold)


def keep(dropout: Dropout, num_heads: int, length: int) -> Tensor:
    """keep_kernel's mask [n, N, L, L] of (sample, head, query, key)."""
    # Names [n, 1, 1], heads [N, 1] and queries [L] broadcast to [n, N, L], a row of keys each.
    query = torch.arange(length, device=dropout.keys.device)
    head = torch.arange(num_heads, device=query.device)[:, None] + dropout.first_head
    name = dropout.keys[:, None, None]
    return keep_mask(dropout.seed, dropout.threshold, length, head, name, name >> 32, first_group=query << 12)
