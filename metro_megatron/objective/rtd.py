"""Replaced token detection: main says of every token whether it is the original one (METRO eq. 6).

Legend: S positions, B rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from metro_megatron.data.batch import StepBatch
from metro_megatron.data.views import View
from metro_megatron.objective.term import Panel, Sums, Term, mean
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from metro_megatron.model.encoder import Reading
    from metro_megatron.parallel.layout import Layout

AUC_BINS = 512
AUC_RANGE = 16.0
"""Logits are counted in AUC_BINS equal bins over [-AUC_RANGE, AUC_RANGE]; what lies outside, in the outer ones."""
EXACT_BINS = 2**20
"""For an evaluation, where the histograms cross no network: bins of 3e-5, finer than any difference that matters."""


class ReplacedTokenDetection(Term):
    """Binary cross-entropy over all real tokens; sigmoid(logit) is the probability of "original".

    A sample that happens to be the original id is an original. A token is called replaced when its logit is below 0.
    """

    name = "rtd"
    exported = "rtd"
    sums = {
        "rtd_loss": 1,
        "replaced_found": 1,
        "original_kept": 1,
        "original_histogram": AUC_BINS,
        "replaced_histogram": AUC_BINS,
    }
    console = {"found": "replace_accuracy"}
    validation_console = {"RTD AUC": "rtd_auc"}
    panels = (
        Panel("RTD loss (nats)", {"rtd_loss": "RTD"}),
        Panel(
            "replaced token detection",
            {"replace_accuracy": "replaced found", "rtd_precision": "precision", "rtd_auc": "AUC"},
            is_share=True,
        ),
    )

    @property
    def weight(self) -> Schedule:
        return Schedule(self.config.objective.rtd_weight)

    def head(self, config: TransformerConfig) -> nn.Module:
        from metro_megatron.model.heads import RTD_HEADS

        return RTD_HEADS[self.config.model.rtd_head].unset(config)

    def denominator(self, batch: StepBatch) -> int:
        return batch.num_tokens

    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        logits = reading.heads[self.name]  # [S, B], whole on every tensor-parallel rank
        is_replaced, is_real = view.is_replaced.t(), view.micro_batch.is_real.t()
        loss = detection_loss(logits, ~is_replaced, is_real)
        return loss, {"rtd_loss": loss.detach(), **detection_sums(logits.detach(), is_replaced, is_real, AUC_BINS)}

    def token_losses(self, reading: Reading, view: View, layout: Layout) -> Tensor | None:
        losses = detection_losses(reading.heads[self.name].t(), ~view.is_replaced)
        return losses.masked_fill(~view.micro_batch.is_real, torch.nan)

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        one = {name: float(value) for name, value in sums.items() if value.numel() == 1}
        replaced, original = one["replaced"], one["num_tokens"] - one["replaced"]
        called_replaced = one["replaced_found"] + original - one["original_kept"]
        return {
            "rtd_loss": mean(one["rtd_loss"], one["num_tokens"]),
            "replace_accuracy": mean(one["replaced_found"], replaced),
            "non_replace_accuracy": mean(one["original_kept"], original),
            "rtd_precision": mean(one["replaced_found"], called_replaced),
            "rtd_auc": area_under_curve(sums["original_histogram"], sums["replaced_histogram"]),
        }

    def exported_logits(self, model: nn.Module, hidden: Tensor, is_masked: Tensor) -> Tensor:
        """[B, S]."""
        return model.get_submodule("rtd_head")(hidden).squeeze(-1).float()

    def exported_sums(self, logits: Tensor, tokens: Tensor, originals: Tensor, is_masked: Tensor) -> Sums:
        is_replaced, is_real = tokens != originals, originals != self.config.model.pad_token_id
        loss = detection_loss(logits.double(), ~is_replaced, is_real)
        return {"rtd_loss": loss, **detection_hits(logits, is_replaced, is_real)}

    def exported_histograms(self, logits: Tensor, tokens: Tensor, originals: Tensor) -> Sums:
        is_replaced, is_real = tokens != originals, originals != self.config.model.pad_token_id
        return detection_histograms(logits, is_replaced, is_real, EXACT_BINS)


def detection_loss(logits: Tensor, is_original: Tensor, is_real: Tensor) -> Tensor:
    """Sum over real tokens of `detection_losses`; all of one shape."""
    return (detection_losses(logits, is_original) * is_real).sum()


def detection_losses(logits: Tensor, is_original: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) = P(original) at every token, of one shape."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.binary_cross_entropy_with_logits(logits, is_original.to(logits.dtype), reduction="none")


def detection_sums(logits: Tensor, is_replaced: Tensor, is_real: Tensor, num_bins: int) -> Sums:
    """Hits, and histograms of the logits; all of one shape."""
    return {
        **detection_hits(logits, is_replaced, is_real),
        **detection_histograms(logits, is_replaced, is_real, num_bins),
    }


def detection_hits(logits: Tensor, is_replaced: Tensor, is_real: Tensor) -> Sums:
    """Of both kinds among the real tokens; all of one shape."""
    says_replaced = logits < 0
    return {
        "replaced_found": (is_real & is_replaced & says_replaced).sum(),
        "original_kept": (is_real & ~(is_replaced | says_replaced)).sum(),
    }


def detection_histograms(logits: Tensor, is_replaced: Tensor, is_real: Tensor, num_bins: int) -> Sums:
    """Of the real tokens' logits by kind, [num_bins] each; all of one shape."""
    bins = ((logits.float() / AUC_RANGE + 1) / 2 * num_bins).long().clamp(0, num_bins - 1)
    # One histogram after the other, padding added as 0: a mask as index and bincount would wait for the device.
    histograms = bins.new_zeros(2 * num_bins)
    histograms.scatter_add_(0, (bins + num_bins * is_replaced).flatten(), is_real.long().flatten())
    original, replaced = histograms.view(2, num_bins)
    return {"original_histogram": original, "replaced_histogram": replaced}


def area_under_curve(original: Tensor, replaced: Tensor) -> float:
    """P(logit of an original token > logit of a replaced one), ties counted half, from two histograms.

    NaN where one class is empty.
    """
    below = (replaced.cumsum(0) - replaced).double()
    wins = (original.double() * (below + replaced.double() / 2)).sum()
    return mean(wins, float(original.sum()) * float(replaced.sum()))
