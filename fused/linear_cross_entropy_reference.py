"""The vocabulary head in plain torch, with all logits of a shard in memory; and the noise that it samples with.

Legend: M rows, H hidden, V vocabulary rows of a shard.
"""

import torch
from torch import Tensor

from fused.linear_cross_entropy_statistics import LOWEST, Statistics, VocabularyShard


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
    return logits.masked_fill(_ids(weight, shard) >= shard.vocab_size, LOWEST)


def _ids(weight: Tensor, shard: VocabularyShard) -> Tensor:
    first = shard.first
    return torch.arange(first, first + weight.size(0), device=weight.device, dtype=torch.int32)


@torch.no_grad()
def shard_statistics_ref(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    noise_keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `shard_statistics` computes: [5 or 7, M], see `merge`."""
    logits = shard_logits_ref(rows, weight, bias, shard)
    ids = _ids(weight, shard)
    top, place = logits.max(-1)
    exponentials = (logits - top[:, None]).exp() * (ids < shard.vocab_size)
    target = logits.masked_fill(ids != targets[:, None], LOWEST).amax(-1)
    weighted = (exponentials * (logits - top[:, None])).sum(-1)
    numbers = [top, exponentials.sum(-1), weighted, target, place + shard.first]
    if noise_keys is not None:
        scores = logits + gumbel_noise(noise_keys, ids)
        never = (ids < shard.num_specials) | (ids >= shard.vocab_size)
        score, place = scores.masked_fill(never, LOWEST).max(-1)
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
    is_target = _ids(weight, shard) == targets[:, None]
    part = share * own - torch.where(is_target, logits, 0.0).sum(-1)
    return statistics.loss + part - part.detach()
