"""Words instead of masked ones by how frequent they are: corruption without a model.

Legend: V vocabulary, M masked positions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.errors import UserError
from metro_megatron.vocabulary import TRAINED_IDS, SpecialIds

_TOTAL = 2.0**52
"""What the weights of all words sum up to: whole numbers, which float64 and int64 both hold exactly."""


class Unigram(Corruptor):
    """p(word) is its frequency in the training shards to the power of corruption.unigram_power; specials have none.

    Functions of the noise keys alone, in whole numbers, so that every layout and device draws the same. counts [V]:
    how often each id is in the shards. Raises UserError if fewer than two words are.
    """

    def __init__(self, config: Config, counts: NDArray[np.int64], device: torch.device):
        weights = unigram_weights(counts, config.corruption.unigram_power, config.model.special_ids)
        if (weights > 0).sum() < 2:
            raise UserError(
                "corruption.source is unigram, but the training shards hold fewer than two words; use other shards"
            )
        self.weights = torch.from_numpy(weights).to(device)
        self.ends = self.weights.cumsum(0)
        self.disallow_correct = config.corruption.disallow_correct

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        targets = micro_batch.masked_targets
        return Proposal(self.draw(micro_batch.noise_keys, targets if self.disallow_correct else None), {})

    def draw(self, noise_keys: Tensor, other_than: Tensor | None) -> Tensor:
        """Ids [M] from noise_keys [M, 2], none of them the one in other_than [M]: the inverse of the distribution."""
        high, low = noise_keys.long().unbind(1)
        uniform = ((high & 0xFFFFFFFF) << 21 | (low & 0xFFFFFFFF) >> 11).double() * 2.0**-53
        total = self.ends[-1].expand(len(uniform))
        if other_than is not None:
            total = total - self.weights[other_than]
        place = (uniform * total).long()  # below total: 53 bits times a number of at most 52
        if other_than is not None:
            before = self.ends[other_than] - self.weights[other_than]
            place = place + self.weights[other_than] * (place >= before)
        return torch.searchsorted(self.ends, place, right=True)


def unigram_weights(
    counts: NDArray[np.int64], power: float, special_ids: SpecialIds = TRAINED_IDS
) -> NDArray[np.int64]:
    """Whole numbers [V] in proportion to counts^power, 0 for specials and for words that do not occur."""
    counts = counts.copy()
    counts[list(special_ids.all)] = 0
    shares = np.maximum(counts, 1) / max(counts.max(), 1)  # of which any power is finite
    powers = np.where(counts > 0, shares**power, 0.0)
    return np.rint(powers * (_TOTAL / max(powers.sum(), 1.0) * (1 - 2.0**-20))).astype(np.int64)
