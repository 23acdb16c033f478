"""What terms are together: the whole loss, the figures of a run or an evaluation, the panels of its picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.views import View
from metro_megatron.objective.digest import CHUNKS, digest_parts
from metro_megatron.objective.term import Panel, Sums, Term, known_count, mean

Number = TypeVar("Number", float, Tensor)
COUNTS = {"num_masked": 1, "num_tokens": 1, "num_places": 1, "replaced": 1, "digest": CHUNKS}
"""Sums that belong to no loss: what the losses are means over, how much was replaced, and what was read."""
COUNT_PANELS = (Panel("replace rate", {"replace_rate": "replaced tokens"}),)


def counts(view: View) -> Sums:
    """COUNTS of a micro batch."""
    is_real = view.micro_batch.is_real
    return {
        "num_masked": known_count(view.micro_batch.masked_index.numel(), is_real.device),
        "num_tokens": is_real.sum(),
        "num_places": known_count(is_real.numel(), is_real.device),
        "replaced": (view.is_replaced & is_real).sum(),
        "digest": digest_parts(view),
    }


def weighted(terms: Iterable[Term], losses: Mapping[str, Number], step: int, batch: StepBatch | None = None) -> Number:
    """The whole loss in step: what `losses` has by name, times the terms' weights (METRO eqs. 7 and 9).

    losses are means, or sums over a micro batch of `batch`, which are divided by its counts.
    """
    parts = []
    for term in terms:
        if term.name in losses:
            part = term.weight_at(step) * losses[term.name]
            parts.append(part if batch is None else part / term.denominator(batch))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def figures(terms: Iterable[Term], sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Losses per masked or real token in nats, shares in [0, 1]; NaN where nothing was counted.

    counts are those that `counts` makes. What a plain masked language model reads is masked, and nothing replaced.
    """
    terms = [*terms]
    found: dict[str, float] = {}
    for term in terms:
        found |= term.figures(sums)
    if not any(_reads_masks(term.config) for term in terms):
        found["replace_rate"] = mean(sums["replaced"], sums["num_tokens"])
    return {
        **found,
        "non_pad_fraction": mean(sums["num_tokens"], sums["num_places"]),
        "tokens": float(sums["num_tokens"]),
    }


def _reads_masks(config: Config) -> bool:
    """An exported model without auxiliary has no source either, and is evaluated on replaced tokens."""
    return config.corruption.source == "none" and "mlm" in config.objective.main


def panels(terms: Iterable[type[Term]]) -> list[Panel]:
    """What the picture of a run with these terms shows; panels of one title are drawn as one."""
    joined: dict[str, Panel] = {}
    for panel in (*(panel for term in terms for panel in term.panels), *COUNT_PANELS):
        before = joined.get(panel.title)
        curves = {**before.curves, **panel.curves} if before else panel.curves
        joined[panel.title] = Panel(panel.title, curves, panel.is_share)
    return list(joined.values())
