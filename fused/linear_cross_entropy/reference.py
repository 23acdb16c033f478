"""What the vocabulary head computes: its types, how pieces of a vocabulary are joined, and all of it in plain torch.

Legend: M rows, H hidden, V vocabulary rows of a shard, t shards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NO_ID = -1e30
"""The logit of "no such id"; finite, so that a shard of padding alone stays free of NaN (inf - inf)."""
MOST_IDS = 2**24
"""Ids travel as float32 beside the other statistics and are exact below this."""

CACHED = 2**16
"""Numbers of 4 bytes, of which a handful of arrays fit into the cache of a processor's core."""


class Sampling(NamedTuple):
    """How ids are drawn, by Gumbel-max: the argmax of logit + T noise is an exact draw from softmax(logits / T)."""

    keys: Tensor
    """[M, 2] int32 that name the rows of the data, so that a sample depends on nothing else."""
    temperature: float = 1.0
    """T."""
    disallow_correct: bool = False
    """The target is never drawn."""


class VocabularyShard(NamedTuple):
    """Which ids the rows of a weight [V, H] are.

    first is the global id of row 0. Ids from vocab_size on only pad the vocabulary: they have no logit. Ids below
    num_specials, and those in scattered, have one but are never sampled.
    """

    first: int
    vocab_size: int
    num_specials: int = 0
    scattered: tuple[int, ...] = ()


class Statistics(NamedTuple):
    """Per row of [M], over the whole vocabulary: float32 (float64 where the reference ran in it) and int64 ids."""

    loss: Tensor
    """-log softmax(logits)[target]."""
    lse: Tensor
    """Logarithm of the sum of exp(logits)."""
    entropy: Tensor
    """Of softmax(logits), in nats."""
    predicted: Tensor
    """The id of the largest logit; of equal ones the smallest id."""
    sampled: Tensor | None
    """An exact draw over the ids that are not special, as `Sampling` says; None where none was asked for."""


def merge(parts: Tensor) -> Tensor:
    """One shard's numbers [5 or 7, M] from those of consecutive pieces of it, [pieces, 5 or 7, M].

    The numbers: largest logit m, sum of exp(x - m), sum of exp(x - m) (x - m), the target's logit, the id of m; and
    with noise the largest perturbed logit and its id. Pieces are in the order of their ids; argmax takes the first.
    """
    # Each piece summed relative to its own largest logit; scale brings them to the largest of all. With y = x - top =
    # (x - m) + shift, the sum of exp(y) y is scale (sum of exp(x - m) (x - m) + shift sum of exp(x - m)).
    top = parts[:, 0].amax(0)
    shift = parts[:, 0] - top
    scale = shift.exp()
    total = (parts[:, 1] * scale).sum(0)
    weighted = ((parts[:, 2] + parts[:, 1] * shift) * scale).sum(0)
    numbers = [top, total, weighted, parts[:, 3].amax(0), _id_of_largest(parts, 0, 4)]
    if parts.size(1) == 7:
        numbers += [parts[:, 5].amax(0), _id_of_largest(parts, 5, 6)]
    return torch.stack(numbers)


def _id_of_largest(parts: Tensor, score: int, identity: int) -> Tensor:
    return parts[:, identity].gather(0, parts[:, score].argmax(0, keepdim=True))[0]


def combine(gathered: Tensor) -> Statistics:
    """Statistics of the whole vocabulary from what all shards say, [t, 5 or 7, M] in the order of their ids.

    The same on every rank that gathered the same.
    """
    numbers = merge(gathered)
    top, total, weighted, target, predicted = numbers[:5]
    log_total = total.log()
    # Entropy is the mean of -log p = log_total - (x - top); weighted / total is the mean of x - top.
    sampled = numbers[6].long() if numbers.size(0) == 7 else None
    return Statistics(
        top + log_total - target, top + log_total, log_total - weighted / total, predicted.long(), sampled
    )


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [M, V] float32 as a function of keys [M, 2] and ids [V], both int32.

    -log(-log(1 - u)) with u = (h + 1/2) 2^-32 of a 32-bit hash h. Small u is exact in float32, so that the
    upper tail, which decides the argmax, has full resolution; u rounded to 1 gives -inf and never wins.
    """
    noise = torch.empty(len(keys), len(ids), device=keys.device)
    # On the CPU some rows at a time, which stay in the second-level cache over the many passes.
    rows = max(1, CACHED // max(len(ids), 1)) if keys.device.type == "cpu" else max(len(keys), 1)
    for part, own in zip(noise.split(rows), keys.split(rows), strict=True):
        part.copy_(hash32(own, ids.int()).view(torch.uint32))
        # The half keeps u above 0, where the noise would be infinite. Above 2^23 it is lost in the rounding, which
        # does no harm: those are small noises. In place, as this is M x V numbers.
        part.add_(0.5).mul_(-(2.0**-32)).log1p_().neg_().log_().neg_()
    return noise


def hash32(keys: Tensor, ids: Tensor) -> Tensor:
    """32 hash bits [M, V], in int32, of keys [M, 2] and ids [V], both int32."""
    mixed = _mix(ids[None, :] * -1640531527 ^ keys[:, :1])  # odd multiplier: 2^32 / golden ratio
    return _mix(mixed ^ keys[:, 1:])


def _mix(x: Tensor) -> Tensor:
    """An invertible 32-bit avalanche on int32 (products wrap; shifts are made logical by the masks).

    Shifts and multipliers are those of `lowbias32`, found by Chris Wellons' search for the least bias among functions
    of two products; the second is 0x846CA68B.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def shard_logits_ref(rows: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabularyShard) -> Tensor:
    """rows weight^T + bias as [M, V], computed in the inputs' dtype and widened; padding ids have NO_ID."""
    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shard.first + weight.size(0) <= shard.vocab_size:
        return logits
    ids = torch.arange(shard.first, shard.first + weight.size(0), device=weight.device)
    return logits.masked_fill(ids >= shard.vocab_size, NO_ID)


def _target_logits(logits: Tensor, targets: Tensor, shard: VocabularyShard, absent: float) -> Tensor:
    """Logits [M] of the targets, `absent` where another shard has them."""
    index = targets - shard.first
    is_here = (index >= 0) & (index < logits.size(1))
    found = logits.gather(1, index.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
    return torch.where(is_here, found, absent)


@torch.no_grad()
def shard_statistics_ref(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    sampling: Sampling | None = None,
) -> Tensor:  # fmt: skip
    """What `shard_statistics` computes: [5 or 7, M], see `merge`."""
    logits = shard_logits_ref(rows, weight, bias, shard)
    top, index = logits.max(-1)
    shifted = logits - top[:, None]
    exponentials = shifted.exp()
    # Also where the shard is padding alone, whose logits are equal.
    exponentials[:, max(shard.vocab_size - shard.first, 0) :] = 0.0
    target = _target_logits(logits, targets, shard, NO_ID)
    weighted = shifted.mul_(exponentials).sum(-1)
    numbers = [top, exponentials.sum(-1), weighted, target, index + shard.first]
    if sampling is not None:
        score, index = perturbed(logits, targets, shard, sampling).max(-1)
        numbers += [score, index + shard.first]
    return torch.stack([number.to(logits.dtype) for number in numbers])


def perturbed(logits: Tensor, targets: Tensor, shard: VocabularyShard, sampling: Sampling) -> Tensor:
    """A shard's logits [M, V] with the noise, whose largest is drawn; NO_ID for ids that never are."""
    ids = torch.arange(shard.first, shard.first + logits.size(1), device=logits.device, dtype=torch.int32)
    scores = gumbel_noise(sampling.keys, ids).mul_(sampling.temperature).to(logits.dtype).add_(logits)
    scores[:, : max(shard.num_specials - shard.first, 0)] = NO_ID
    if shard.scattered:
        scores.masked_fill_(is_special(ids, shard), NO_ID)
    scores[:, max(shard.vocab_size - shard.first, 0) :] = NO_ID
    if sampling.disallow_correct:
        scores.masked_fill_(ids == targets[:, None], NO_ID)
    return scores


def is_special(ids: Tensor, shard: VocabularyShard) -> Tensor:
    """bool of the shape of ids: those that are never sampled."""
    found = ids < shard.num_specials
    for one in shard.scattered:
        found = found | (ids == one)
    return found


def shard_loss_ref(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard, statistics: Statistics
) -> Tensor:
    """What `shard_loss` computes: statistics.loss [M], with this shard's part of its gradient.

    The loss depends on the shard's logits by exp(own lse - lse) (own lse) - (target's logit, where it is here).
    """
    # The gradient of exp(own - lse) own, the first factor held fixed, is the shard's part of softmax: exp(logit - lse).
    logits = shard_logits_ref(rows, weight, bias, shard)
    own = logits.logsumexp(-1)
    share = (own.detach() - statistics.lse).exp()
    part = share * own - _target_logits(logits, targets, shard, 0.0)
    return statistics.loss + part - part.detach()  # the value of all shards' loss, the gradient of this part
