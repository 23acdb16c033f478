"""What a shard of the vocabulary says about rows, and how shards are joined.

Legend: M rows, V vocabulary rows of a shard, t shards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e30
"""Stands for "no such id"; finite, so that a shard of padding alone stays free of NaN."""
MOST_IDS = 2**24
"""Ids travel as float32 beside the other statistics and are exact below this."""


class VocabularyShard(NamedTuple):
    """Which ids the rows of a weight [V, H] are.

    first is the global id of row 0. Ids from vocab_size on only pad the vocabulary: they have no logit. Ids below
    num_specials have one but are never sampled.
    """

    first: int
    vocab_size: int
    num_specials: int = 0


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
    """An exact draw from softmax over the ids that are not special; None where no noise was asked for."""


def merge(parts: Tensor) -> Tensor:
    """One shard's numbers [5 or 7, M] from those of consecutive pieces of it, [pieces, 5 or 7, M].

    The numbers: largest logit m, sum of exp(x - m), sum of exp(x - m) (x - m), the target's logit, the id of m; and
    with noise the largest perturbed logit and its id. Pieces are in the order of their ids; argmax takes the first.
    """
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
    sampled = numbers[6].long() if numbers.size(0) == 7 else None
    return Statistics(
        top + log_total - target, top + log_total, log_total - weighted / total, predicted.long(), sampled
    )
