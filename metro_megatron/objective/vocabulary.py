"""Cross-entropy over a vocabulary that tensor-parallel ranks share out, and what language models have in common.

Legend: M masked positions, V vocabulary (rows of this rank where it is split), H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from fused.linear_cross_entropy import (
    NO_ID,
    Sampling,
    Statistics,
    VocabularyShard,
    combine,
    gumbel_noise,
    is_special,
    linear_cross_entropy,
    shard_logits_ref,
    shard_loss,
    shard_statistics,
)
from metro_megatron.config.schema import ModelConfig
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.objective.term import Sums, Term, mean

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from metro_megatron.model.encoder import Reading
    from metro_megatron.model.heads import Decoding
    from metro_megatron.parallel.layout import Layout


ROWS = 256
"""Rows whose logits `wrong_samples` holds at a time: 131 MB of 128,000 in FP32."""


def vocabulary_shard(first: int, model_config: ModelConfig) -> VocabularyShard:
    """That of a rank whose first row is the id `first`; no special id is ever drawn."""
    special_ids = model_config.special_ids
    return VocabularyShard(first, model_config.vocab_size, special_ids.first_word, special_ids.scattered)


def vocabulary_statistics(
    decoding: Decoding, targets: Tensor, model_config: ModelConfig, group: ProcessGroup,
    sampling: Sampling | None = None,
) -> Statistics:  # fmt: skip
    """Losses [M] with their graph, most probable ids, and with sampling samples; the same on every rank.

    Ranks exchange 5 or 7 numbers a row. targets [M] are global ids.
    """
    shard = vocabulary_shard(group.rank() * decoding.weight.size(0), model_config)
    if group.size() == 1:
        return linear_cross_entropy(*decoding, targets, shard, sampling)
    partial = shard_statistics(*decoding, targets, shard, sampling)
    gathered = partial.new_empty(group.size() * partial.size(0), partial.size(1))
    dist.all_gather_into_tensor(gathered, partial, group=group)
    statistics = combine(gathered.view(group.size(), *partial.shape))
    return statistics._replace(loss=shard_loss(*decoding, targets, shard, statistics))


@torch.no_grad()
def wrong_samples(
    decoding: Decoding, targets: Tensor, model_config: ModelConfig, group: ProcessGroup, sampling: Sampling, count: int
) -> Tensor:
    """int64 [M, count] ids other than the targets [M], drawn without putting back; the same on every rank.

    They are the largest logits perturbed by Gumbel noise (Kool et al. 2019). The noise is that of `Statistics.sampled`:
    a sample that is no target is the first of them. Logits of ROWS rows exist at a time.
    """
    shard = vocabulary_shard(group.rank() * decoding.weight.size(0), model_config)
    ids = torch.arange(shard.first, shard.first + decoding.weight.size(0), device=targets.device)
    is_word = (ids < shard.vocab_size) & ~is_special(ids, shard)
    best = [torch.empty(2, 0, count, dtype=torch.float64, device=targets.device)]
    for rows, own, keys in zip(*(x.split(ROWS) for x in (decoding.rows, targets, sampling.keys)), strict=True):
        noise = sampling.temperature * gumbel_noise(keys, ids.int())
        scores = shard_logits_ref(rows, decoding.weight, decoding.bias, shard) + noise
        top, index = scores.masked_fill(~is_word | (ids == own[:, None]), NO_ID).topk(count)
        best.append(torch.stack([top.double(), ids[index].double()]))
    partial = torch.cat(best, dim=1)
    gathered = partial.new_empty(group.size() * 2, *partial.shape[1:])
    dist.all_gather_into_tensor(gathered, partial, group=group)
    scores, found = gathered.view(group.size(), *partial.shape).permute(1, 2, 0, 3).flatten(2)
    return found.gather(1, scores.topk(count).indices).long()


def at_masks(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    """[B, S] of values [M] of the masked positions; NaN elsewhere."""
    rows, length = micro_batch.tokens.shape
    spread = torch.full((length * rows,), torch.nan, dtype=values.dtype, device=values.device)
    return spread.index_copy(0, micro_batch.masked_index, values).view(length, rows).t()


class MaskedPositions(Term):
    """A mean over the masked positions, where a tied decoder scores ids: figures `{name}_loss`, `{name}_accuracy`."""

    def head(self, config: TransformerConfig) -> nn.Module:
        from metro_megatron.model.heads import LM_HEADS

        return LM_HEADS[self.config.model.lm_head](config, self.config.model)

    def denominator(self, batch: StepBatch) -> int:
        return max(batch.num_masked, 1)

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            f"{self.name}_loss": mean(sums[f"{self.name}_loss"], sums["num_masked"]),
            f"{self.name}_accuracy": mean(sums[f"{self.name}_correct"], sums["num_masked"]),
        }

    def exported_head(self, model: nn.Module) -> nn.Module:
        """The exported model's head: hidden states to logits."""
        return model.get_submodule(f"{self.name}_head")

    def exported_logits(self, model: nn.Module, hidden: Tensor, is_masked: Tensor) -> Tensor:
        """[M, V] in the order of is_masked's rows; all positions of a large vocabulary would not fit."""
        return self.exported_head(model)(hidden[is_masked]).float()


class LanguageModel(MaskedPositions):
    """Cross-entropy of the original ids over the whole vocabulary."""

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        return self.summed(self.found(reading, view, layout), view.micro_batch.masked_targets)

    def found(self, reading: Reading, view: View, layout: Layout) -> Statistics:
        """The losses [M] that the loss is the sum of, with their graph, and most probable ids."""
        return self.statistics(reading.heads[self.name], view.micro_batch, layout.tensor)

    def token_losses(self, reading: Reading, view: View, layout: Layout) -> Tensor | None:
        return at_masks(self.found(reading, view, layout).loss, view.micro_batch)

    def statistics(
        self, decoding: Decoding, micro_batch: MicroBatch, group: ProcessGroup, sampling: Sampling | None = None
    ) -> Statistics:
        """See `vocabulary_statistics`."""
        return vocabulary_statistics(decoding, micro_batch.masked_targets, self.config.model, group, sampling)

    def distractors(
        self, decoding: Decoding, micro_batch: MicroBatch, group: ProcessGroup, sampling: Sampling, count: int
    ) -> Tensor | None:
        """[M, count], see `wrong_samples`; None for none."""
        if not count:
            return None
        return wrong_samples(decoding, micro_batch.masked_targets, self.config.model, group, sampling, count)

    def summed(self, found: Statistics, targets: Tensor) -> tuple[Tensor, Sums]:
        """The loss's sum with its graph, and the sums of this term."""
        loss = found.loss.sum()
        return loss, {
            f"{self.name}_loss": loss.detach(),
            f"{self.name}_correct": (found.predicted == targets).sum(),
        }

    def exported_sums(self, logits: Tensor, tokens: Tensor, originals: Tensor, is_masked: Tensor) -> Sums:
        targets = originals[is_masked]
        return {
            f"{self.name}_loss": functional.cross_entropy(logits.double(), targets, reduction="sum"),
            f"{self.name}_correct": (logits.argmax(-1) == targets).sum(),
        }
