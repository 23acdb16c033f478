"""The sums that a run is judged by, on this rank, and how they come together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from metro_megatron.objective.figures import COUNTS, figures
from metro_megatron.objective.term import Sums, Term
from metro_megatron.parallel.layout import Layout


class MetricSums:
    """The sums of the terms on this rank over some steps, in one vector, so that one all-reduce is enough."""

    def __init__(self, layout: Layout, terms: Sequence[Term]):
        self.layout = layout
        self.terms = list(terms)
        self.slices: dict[str, slice] = {}
        start = 0
        for sums in (COUNTS, *(term.sums for term in self.terms)):
            for name, size in sums.items():
                self.slices[name] = slice(start, start + size)
                start += size
        # float64: counts stay exact, and small losses are not lost beside large sums.
        self.vector = torch.zeros(start, dtype=torch.float64, device=layout.device)

    def add(self, many: Iterable[Sums]) -> None:
        """Add one micro batch's sums each. Tensor-parallel ranks hold the same: the first one counts."""
        if self.layout.tensor.rank() != 0:
            return
        for sums in many:
            for name, value in sums.items():
                self.vector[self.slices[name]] += value

    def reduce(self) -> dict[str, float]:
        """Figures over all ranks; starts again from zero. A collective call."""
        dist.all_reduce(self.vector, group=self.layout.world)
        total = self.vector.to("cpu", copy=True)  # one copy, as the host waits for each
        self.vector.zero_()
        return figures(self.terms, {name: total[part] for name, part in self.slices.items()})
