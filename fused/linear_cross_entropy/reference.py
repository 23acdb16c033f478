"""The vocabulary head in plain torch, with all logits of a shard in memory; and the noise that it samples with.

Legend: M rows, H hidden, V vocabulary rows of a shard.
"""

import torch
from torch import Tensor

from fused.linear_cross_entropy.statistics import LOWEST, Statistics, VocabularyShard


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [M, V] float32 as a function of keys [M, 2] and ids [V], both int32.

    -log(-log(1 - u)) with u = (h + 1/2) 2^-32 of a 32-bit hash h. Small u is exact in float32, so that the
    upper tail, which decides the argmax, has full resolution; u rounded to 1 gives -inf and never wins.
    """
    uniform = ((hash32(keys, ids).long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    return uniform.neg_().log1p_().neg_().log_().neg_()


def hash32(keys: Tensor, ids: Tensor) -> Tensor:
    """32 hash bits [M, V], in int32, of keys [M, 2] and ids [V], both int32."""
    mixed = _mix(ids[None, :] * -1640531527 ^ keys[:, :1])  # odd multiplier: 2^32 / golden ratio
    return _mix(mixed ^ keys[:, 1:])


def _mix(x: Tensor) -> Tensor:
    """An invertible 32-bit avalanche on int32 (products wrap; shifts are made logical by the masks)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def shard_logits_ref(rows: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabularyShard) -> Tensor:
    """rows weight^T + bias as [M, V], computed in the inputs' dtype and widened; padding ids have LOWEST."""
    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shard.first + weight.size(0) <= shard.vocab_size:
        return logits
    return logits.masked_fill(_ids(weight, shard) >= shard.vocab_size, LOWEST)


def _ids(weight: Tensor, shard: VocabularyShard) -> Tensor:
    first = shard.first
    return torch.arange(first, first + weight.size(0), device=weight.device, dtype=torch.int32)


def _target_logits(logits: Tensor, targets: Tensor, shard: VocabularyShard, absent: float) -> Tensor:
    """Logits [M] of the targets, `absent` where another shard has them."""
    place = targets - shard.first
    is_here = (place >= 0) & (place < logits.size(1))
    found = logits.gather(1, place.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
    return torch.where(is_here, found, absent)


@torch.no_grad()
def shard_statistics_ref(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    noise_keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `shard_statistics` computes: [5 or 7, M], see `merge`."""
    logits = shard_logits_ref(rows, weight, bias, shard)
    top, place = logits.max(-1)
    shifted = logits - top[:, None]
    exponentials = shifted.exp()
    real = max(shard.vocab_size - shard.first, 0)
    exponentials[:, real:] = 0.0  # also where the shard is padding alone, whose logits are equal
    target = _target_logits(logits, targets, shard, LOWEST)
    weighted = shifted.mul_(exponentials).sum(-1)
    numbers = [top, exponentials.sum(-1), weighted, target, place + shard.first]
    if noise_keys is not None:
        scores = logits + gumbel_noise(noise_keys, _ids(weight, shard))
        scores[:, : max(shard.num_specials - shard.first, 0)] = LOWEST
        scores[:, real:] = LOWEST
        score, place = scores.max(-1)
        numbers += [score, place + shard.first]
    return torch.stack([number.to(logits.dtype) for number in numbers])


def shard_loss_ref(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard, statistics: Statistics
) -> Tensor:
    """What `shard_loss` computes: statistics.loss [M], with this shard's part of its gradient.

    The loss depends on the shard's logits by exp(own lse - lse) (own lse) - (target's logit, where it is here).
    """
    logits = shard_logits_ref(rows, weight, bias, shard)
    own = logits.logsumexp(-1)
    share = (own.detach() - statistics.lse).exp()
    part = share * own - _target_logits(logits, targets, shard, 0.0)
    return statistics.loss + part - part.detach()
