"""Any word instead of a masked one, each as likely: corruption without a model (ELECTRA's uniform generator)."""

from __future__ import annotations

from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch


class Uniform(Corruptor):
    """Functions of the noise keys alone, so that every layout draws the same."""

    def __init__(self, config: Config):
        self.special_ids = config.model.special_ids
        self.num_words = self.special_ids.num_words(config.model.vocab_size)
        self.disallow_correct = config.corruption.disallow_correct

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        targets = micro_batch.masked_targets
        return Proposal(self.draw(micro_batch.noise_keys, targets if self.disallow_correct else None), {})

    def draw(self, noise_keys: Tensor, other_than: Tensor | None) -> Tensor:
        """Ids [M] of words from noise_keys [M, 2], none of them the one in other_than [M].

        32 bits times the number of words: the odds of two words differ by at most words / 2^32.
        """
        words = self.num_words - (other_than is not None)
        number = (noise_keys[:, 0].long() & 0xFFFFFFFF) * words >> 32
        if other_than is not None:
            # All words but one are numbered as if it were not there.
            number = number + (number >= self.special_ids.number(other_than))
        return self.special_ids.word(number)
