"""Sequence contrastive learning: the corrupted text and a crop of the original one know each other (COCO-LM).

METRO's ablation "RTD+SCL". Temperature and weight 1 are COCO-LM's defaults, its paper's values are not verified.

Legend: S positions, R rows of both views, n samples of a micro batch, N of all that are compared, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View, crop
from metro_megatron.objective.term import Panel, Sums, Term, known_count, mean
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from metro_megatron.model.encoder import Reading
    from metro_megatron.parallel.layout import Layout


class SequenceContrast(Term):
    """InfoNCE of every sample's two views, each an anchor once, over cosines of a projection of <s>.

    A sample's loss depends on what it is compared with. With scl_negatives micro_batch that is its micro batch: runs
    agree wherever these hold the same samples, whatever the layout. With all_ranks it is the micro batches of one
    number of all data-parallel ranks, and the loss depends on how many there are.
    """

    name = "scl"
    exported = ""
    sums = {"scl_loss": 1, "scl_correct": 1, "scl_anchors": 1}
    panels = (
        Panel("sequence contrastive loss (nats)", {"scl_loss": "SCL"}),
        Panel("sequence contrast accuracy", {"scl_accuracy": "SCL"}, is_share=True),
    )

    @property
    def weight(self) -> Schedule:
        return Schedule(self.config.objective.scl_weight)

    def head(self, config: TransformerConfig) -> nn.Module:
        from metro_megatron.model.heads import SequenceHead

        return SequenceHead(config)

    def second_view(self, view: View) -> View:
        cropped = crop(view.micro_batch, self.config.objective.scl_crop, self.config.model.pad_token_id)
        return View(cropped.tokens, cropped)

    def teaches(self, micro_batch: MicroBatch) -> bool:
        return sum(self._compared(micro_batch)) > 1

    def least_read(self, batch: StepBatch) -> int:
        return batch.num_samples

    def denominator(self, batch: StepBatch) -> int:
        return max(2 * batch.num_samples, 1)

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        states = reading.heads[self.name]
        group = layout.data if self.config.objective.scl_negatives == "all_ranks" else layout.solo
        samples = self._compared(view.micro_batch)
        loss, correct = contrast(states, samples, self.config.objective.scl_temperature, group)
        anchors = known_count(len(states), states.device)
        return loss, {"scl_loss": loss.detach(), "scl_correct": correct, "scl_anchors": anchors}

    def _compared(self, micro_batch: MicroBatch) -> list[int]:
        """Samples of every rank whose sequences are compared with a micro batch's."""
        is_wide = self.config.objective.scl_negatives == "all_ranks"
        return list(micro_batch.samples_of_ranks) if is_wide else [micro_batch.num_samples]

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            "scl_loss": mean(sums["scl_loss"], sums["scl_anchors"]),
            "scl_accuracy": mean(sums["scl_correct"], sums["scl_anchors"]),
        }


def contrast(states: Tensor, samples: list[int], temperature: float, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sum over this rank's anchors of -log softmax(cos / temperature)[partner], and how often the partner is nearest.

    states [2 n, H]: samples' first views, then their second ones; n is another one on every rank of group: samples.
    An anchor is compared with all 2 N states of the group but itself.
    """
    own = functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
    everyone, first = gather_rows(own, [2 * count for count in samples], group)
    count = len(own)
    if not count:  # its loss is 0, with a graph: other ranks' gradients pass through it
        return 0 * everyone.sum(), own.new_zeros(())
    anchor = torch.arange(count, device=own.device)
    partner = (anchor + count // 2) % count
    is_self = anchor[:, None] + first == torch.arange(len(everyone), device=own.device)
    similarity = (own @ everyone.t() / temperature).masked_fill(is_self, -torch.inf)
    target = partner[:, None] + first
    losses = similarity.logsumexp(-1) - similarity.gather(1, target)[:, 0]
    return losses.sum(), (similarity.argmax(-1) == target[:, 0]).sum()


def gather_rows(own: Tensor, sizes: list[int], group: ProcessGroup) -> tuple[Tensor, int]:
    """The rows of all ranks [2 N, H], in their order, and where this rank's begin. Gradients are exact sums.

    sizes: rows of every rank, known without asking them.
    """
    if group.size() == 1:
        return own, 0
    return _Gather.apply(own, sizes, group), sum(sizes[: group.rank()])


class _Gather(torch.autograd.Function):
    """Rows of all ranks; a row's gradient is the sum of what all ranks' losses say of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.begin, ctx.count = group, sum(sizes[: group.rank()]), len(own)
        padded = own.new_zeros(max(sizes), own.size(1))
        padded[: len(own)] = own
        everyone = own.new_empty(len(sizes) * len(padded), own.size(1))
        dist.all_gather_into_tensor(everyone, padded, group=group)
        parts = everyone.view(len(sizes), *padded.shape)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.begin : ctx.begin + ctx.count], None, None
