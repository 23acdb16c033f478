"""Sampling from vocabulary-parallel logits without gathering them, with noise from global coordinates.

Legend: M masked positions, V vocabulary rows of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_ELEMENTS = 2**25
"""Elements of noise made at a time, to bound memory at large vocabularies."""


def vocabulary_argmax(scores: Tensor, group: ProcessGroup) -> Tensor:
    """Global ids [M] of the largest score over all ranks' [M, V]; the same on every rank.

    Where scores are equal the smallest id wins, whatever the number of ranks.
    """
    best, ids = scores.max(dim=-1)
    ids = ids + group.rank() * scores.size(-1)
    if group.size() == 1:
        return ids
    overall = best.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    ids = torch.where(best == overall, ids, torch.iinfo(torch.int64).max)
    dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=group)
    return ids


@torch.no_grad()
def gumbel_max_sample(logits: Tensor, noise_keys: Tensor, group: ProcessGroup, num_specials: int) -> Tensor:
    """One id [M] per row of this rank's logits [M, V], drawn from softmax over the whole vocabulary.

    Gumbel-max: argmax of logits plus independent Gumbel noise is an exact sample, and needs only an argmax
    across ranks. noise_keys [M, 2] int32 names the place in the data, so that the sample does not depend on
    the layout. Ids below num_specials are never drawn; ids whose logit is -inf cannot be.
    """
    num_ids = logits.size(-1)
    first = group.rank() * num_ids
    ids = torch.arange(first, first + num_ids, device=logits.device, dtype=torch.int32)
    rows = max(1, CHUNK_ELEMENTS // num_ids)
    samples = []
    for start in range(0, logits.size(0), rows):
        part = slice(start, start + rows)
        scores = logits[part].float() + gumbel_noise(noise_keys[part], ids)
        scores.masked_fill_(ids < num_specials, -torch.inf)
        samples.append(vocabulary_argmax(scores, group))
    return torch.cat(samples) if samples else ids.new_empty(0, dtype=torch.int64)


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [M, V] float32 as a function of keys [M, 2] and ids [V], both int32.

    -log(-log(1 - u)) with u = (h + 1/2) 2^-32 of a 32-bit hash h. Small u is exact in float32, so that the
    upper tail, which decides the argmax, has full resolution; u rounded to 1 gives -inf and never wins.
    """
    mixed = _mix(ids[None, :] * -1640531527 ^ keys[:, :1])  # odd multiplier: 2^32 / golden ratio
    mixed = _mix(mixed ^ keys[:, 1:])
    uniform = ((mixed.long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """An invertible 32-bit avalanche on int32 (products wrap; shifts are made logical by the masks)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)
