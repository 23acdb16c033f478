"""Corrective language modelling: main names the original at every masked position (METRO eq. 8, COCO-LM).

Legend: M masked positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from metro_megatron.data.views import View
from metro_megatron.objective.term import Panel
from metro_megatron.objective.vocabulary import LanguageModel
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from fused.linear_cross_entropy import Statistics
    from metro_megatron.model.encoder import Reading
    from metro_megatron.parallel.layout import Layout


class CorrectiveLanguageModel(LanguageModel):
    """Of the cross-entropy CE of the originals, whether or not a corruptor has put the original there.

    objective.clm simplified: CE itself (METRO eq. 8). weighted: `weighted_loss`. mixture: `mixture_loss`. The latter
    two read the logits of replaced token detection, which get no gradient from here. Evaluation of an exported model
    reports CE in all three cases.
    """

    name = "clm"
    exported = "clm"
    sums = {"clm_loss": 1, "clm_correct": 1}
    panels = (
        Panel("CLM loss of the main model (nats)", {"clm_loss": "CLM"}),
        Panel("language modeling accuracy", {"clm_accuracy": "CLM"}),
    )

    @property
    def weight(self) -> Schedule:
        return Schedule(self.config.objective.clm_weight)

    def found(self, reading: Reading, view: View, layout: Layout) -> Statistics:
        found = super().found(reading, view, layout)
        if self.config.objective.clm == "simplified":
            return found
        micro_batch = view.micro_batch
        logits = reading.heads["rtd"].detach().flatten()[micro_batch.masked_index].to(found.loss.dtype)
        if self.config.objective.clm == "weighted":
            losses = weighted_loss(found.loss, logits)
        else:
            is_replaced = view.is_replaced.t().flatten()[micro_batch.masked_index]
            losses = mixture_loss(found.loss, logits, ~is_replaced)
        return found._replace(loss=losses)


def weighted_loss(losses: Tensor, logits: Tensor) -> Tensor:
    """(1 - sigmoid(r)) CE: what main takes for an original, it need not generate (COCO-LM, its author's code).

    losses CE [M] and logits r [M], where sigmoid(r) is the probability of "original".
    """
    return torch.sigmoid(-logits) * losses


def mixture_loss(losses: Tensor, logits: Tensor, is_copied: Tensor) -> Tensor:
    """-log(c pc + (1 - pc) exp(-CE)): main copies its input with probability pc = sigmoid(r), or generates (COCO-LM).

    c is 1 where the input, if copied, is right: is_copied [M]. losses CE [M], logits r [M].
    """
    generated = logsigmoid(-logits) - losses
    return -torch.where(is_copied, torch.logaddexp(logsigmoid(logits), generated), generated)
