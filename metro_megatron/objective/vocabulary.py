"""Cross-entropy over a vocabulary that tensor-parallel ranks share out, and what language models have in common.

Legend: M masked positions, V vocabulary (rows of this rank where it is split), H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from fused.linear_cross_entropy import Sampling, Statistics, VocabularyShard, combine, shard_loss, shard_statistics
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.objective.term import Sums, Term
from metro_megatron.vocabulary import NUM_SPECIALS

if TYPE_CHECKING:
    from metro_megatron.model.encoder import Reading
    from metro_megatron.model.heads import Decoding


def vocabulary_statistics(
    decoding: Decoding, targets: Tensor, vocab_size: int, group: ProcessGroup, sampling: Sampling | None = None
) -> Statistics:
    """Losses [M] with their graph, most probable ids, and with sampling samples; the same on every rank.

    Ranks exchange 5 or 7 numbers a row. targets [M] are global ids.
    """
    shard = VocabularyShard(group.rank() * decoding.weight.size(0), vocab_size, NUM_SPECIALS)
    partial = shard_statistics(*decoding, targets, shard, sampling)
    gathered = partial.new_empty(group.size() * partial.size(0), partial.size(1))
    dist.all_gather_into_tensor(gathered, partial, group=group)
    statistics = combine(gathered.view(group.size(), *partial.shape))
    return statistics._replace(loss=shard_loss(*decoding, targets, shard, statistics))


class LanguageModel(Term):
    """Cross-entropy of the original ids at the masked positions: figures `{name}_loss` and `{name}_accuracy`."""

    def denominator(self, batch: StepBatch) -> int:
        return max(batch.num_masked, 1)

    def loss(self, reading: Reading, view: View, group: ProcessGroup) -> tuple[Tensor, Sums]:
        micro_batch = view.micro_batch
        found = self.statistics(reading.heads[self.name], micro_batch, group)
        return self.summed(found, micro_batch.masked_targets)

    def statistics(
        self, decoding: Decoding, micro_batch: MicroBatch, group: ProcessGroup, sampling: Sampling | None = None
    ) -> Statistics:
        """See `vocabulary_statistics`."""
        vocab_size = self.config.model.vocab_size
        return vocabulary_statistics(decoding, micro_batch.masked_targets, vocab_size, group, sampling)

    def summed(self, found: Statistics, targets: Tensor) -> tuple[Tensor, Sums]:
        """The loss's sum with its graph, and the sums of this term."""
        loss = found.loss.sum()
        return loss, {
            f"{self.name}_loss": loss.detach(),
            f"{self.name}_correct": (found.predicted == targets).sum(),
        }

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        masked = max(float(sums["num_masked"]), 1.0)
        return {
            f"{self.name}_loss": float(sums[f"{self.name}_loss"]) / masked,
            f"{self.name}_accuracy": float(sums[f"{self.name}_correct"]) / masked,
        }

    @abstractmethod
    def exported_head(self, model: nn.Module) -> nn.Module:
        """The exported model's head: hidden states to logits."""

    def exported_logits(self, model: nn.Module, hidden: Tensor, is_masked: Tensor) -> Tensor:
        """[M, V] in the order of is_masked's rows; all positions of a large vocabulary would not fit."""
        return self.exported_head(model)(hidden[is_masked]).float()

    def exported_sums(self, logits: Tensor, tokens: Tensor, originals: Tensor, is_masked: Tensor) -> Sums:
        targets = originals[is_masked]
        return {
            f"{self.name}_loss": functional.cross_entropy(logits.double(), targets, reduction="sum"),
            f"{self.name}_correct": (logits.argmax(-1) == targets).sum(),
        }
