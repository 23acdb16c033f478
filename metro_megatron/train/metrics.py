"""What a step is judged by: sums that add up over micro batches, ranks and steps, and figures made of them.

Legend: M masked positions, S positions, B rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from metro_megatron.data.batch import MicroBatch
from metro_megatron.parallel.layout import Layout

AUC_BINS = 512
AUC_RANGE = 16.0
"""RTD logits are counted in AUC_BINS equal bins over [-AUC_RANGE, AUC_RANGE]."""
SUMS = {
    "mlm_loss": 1,
    "rtd_loss": 1,
    "clm_loss": 1,
    "num_masked": 1,
    "num_tokens": 1,
    "num_places": 1,
    "mlm_correct": 1,
    "sample_correct": 1,
    "clm_correct": 1,
    "replaced": 1,
    "replaced_found": 1,
    "original_kept": 1,
    "original_histogram": AUC_BINS,
    "replaced_histogram": AUC_BINS,
}
"""Name and number of elements of every sum."""

Sums = dict[str, Tensor]


@torch.no_grad()
def auxiliary_sums(loss: Tensor, predicted: Tensor, sampled: Tensor, targets: Tensor) -> Sums:
    """Sums of phase 1: MLM loss sum, and how many argmaxes and samples [M] are the original ids [M]."""
    return {
        "mlm_loss": loss.detach(),
        "num_masked": torch.tensor(float(targets.numel()), device=targets.device),
        "mlm_correct": (predicted == targets).sum(),
        "sample_correct": (sampled == targets).sum(),
    }


@torch.no_grad()
def main_sums(rtd_loss: Tensor, clm_loss: Tensor, rtd_logits: Tensor, is_replaced: Tensor, batch: MicroBatch) -> Sums:
    """Sums of phase 2 from RTD logits [S, B] and where tokens were replaced [S, B].

    A token is called replaced when sigmoid(logit) < 1/2.
    """
    is_real = batch.is_real.t()
    says_replaced = rtd_logits < 0
    bins = ((rtd_logits.float() / AUC_RANGE + 1) / 2 * AUC_BINS).long().clamp(0, AUC_BINS - 1)
    return {
        "rtd_loss": rtd_loss.detach(),
        "clm_loss": clm_loss.detach(),
        "num_tokens": is_real.sum(),
        "num_places": torch.tensor(float(is_real.numel()), device=is_real.device),
        "replaced": is_replaced.sum(),
        "replaced_found": (is_replaced & says_replaced).sum(),
        "original_kept": (is_real & ~is_replaced & ~says_replaced).sum(),
        "original_histogram": torch.bincount(bins[is_real & ~is_replaced], minlength=AUC_BINS),
        "replaced_histogram": torch.bincount(bins[is_replaced], minlength=AUC_BINS),
    }


class MetricSums:
    """The sums of this rank over some steps."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.vector = torch.zeros(sum(SUMS.values()), dtype=torch.float64, device=layout.device)
        self.place: dict[str, slice] = {}
        start = 0
        for name, size in SUMS.items():
            self.place[name] = slice(start, start + size)
            start += size

    def add(self, many: Iterable[Sums]) -> None:
        """Add one micro batch's sums each. Tensor-parallel ranks hold the same: the first one counts."""
        if self.layout.tensor.rank() != 0:
            return
        for sums in many:
            for name, value in sums.items():
                self.vector[self.place[name]] += value

    def reduce(self) -> dict[str, float]:
        """Figures over all ranks; starts again from zero. A collective call."""
        dist.all_reduce(self.vector, group=self.layout.world)
        sums = {name: self.vector[place].cpu().clone() for name, place in self.place.items()}
        self.vector.zero_()
        return figures(sums)


def figures(sums: Sums) -> dict[str, float]:
    """Means and rates of recipe: losses per masked or real token in nats, shares in [0, 1]."""
    one = {name: float(value) for name, value in sums.items() if value.numel() == 1}
    masked, tokens = max(one["num_masked"], 1.0), max(one["num_tokens"], 1.0)
    replaced, original = one["replaced"], one["num_tokens"] - one["replaced"]
    called_replaced = one["replaced_found"] + original - one["original_kept"]
    return {
        "aux_loss": one["mlm_loss"] / masked,
        "rtd_loss": one["rtd_loss"] / tokens,
        "clm_loss": one["clm_loss"] / masked,
        "mlm_accuracy": one["mlm_correct"] / masked,
        "sampled_accuracy": one["sample_correct"] / masked,
        "clm_accuracy": one["clm_correct"] / masked,
        "replace_rate": replaced / tokens,
        "replace_accuracy": one["replaced_found"] / max(replaced, 1.0),
        "non_replace_accuracy": one["original_kept"] / max(original, 1.0),
        "rtd_precision": one["replaced_found"] / max(called_replaced, 1.0),
        "rtd_auc": area_under_curve(sums["original_histogram"], sums["replaced_histogram"]),
        "non_pad_fraction": one["num_tokens"] / max(one["num_places"], 1.0),
        "tokens": one["num_tokens"],
    }


def area_under_curve(original: Tensor, replaced: Tensor) -> float:
    """P(logit of an original token > logit of a replaced one), ties counted half, from two histograms.

    1/2 where one class is empty.
    """
    pairs = float(original.sum() * replaced.sum())
    if pairs == 0.0:
        return 0.5
    below = replaced.cumsum(0) - replaced
    return float((original * (below + replaced / 2)).sum()) / pairs
