"""The sums that a run is judged by, on this rank, and how they come together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from metro_megatron.objective.digest import digest
from metro_megatron.objective.figures import COUNTS, figures
from metro_megatron.objective.term import Sums, Term
from metro_megatron.parallel.layout import Layout


class MetricSums:
    """The sums of the terms on this rank, a row for each step, in one tensor, so that one all-reduce is enough.

    Rows, as a step whose sums are not finite on some rank is left out on all: it would spoil the others' means.
    """

    def __init__(self, layout: Layout, terms: Sequence[Term]):
        self.layout = layout
        self.terms = list(terms)
        self.slices: dict[str, slice] = {}
        self.size = 0
        for sums in (COUNTS, *(term.sums for term in self.terms)):
            for name, size in sums.items():
                self.slices[name] = slice(self.size, self.size + size)
                self.size += size
        self.rows = [self._row()]
        """Of the steps that are done, and of the one under way."""
        self.digest = 0
        """Of what `reduce` has last returned figures of (objective/digest.py)."""
        self.before: Tensor | None = None
        """[size] over all ranks, what `state` returned before the run was interrupted."""

    def _row(self) -> Tensor:
        # float64: counts stay exact, and small losses are not lost beside large sums.
        return torch.zeros(self.size, dtype=torch.float64, device=self.layout.device)

    def add(self, many: Iterable[Sums]) -> None:
        """Add one micro batch's sums each. Tensor-parallel ranks hold the same: the first one counts."""
        if self.layout.tensor.rank() != 0:
            return
        for sums in many:
            for name, value in sums.items():
                self.rows[-1][self.slices[name]] += value

    def end_step(self) -> None:
        """What is added from here on is of another step."""
        self.rows.append(self._row())

    def reduce(self) -> dict[str, float]:
        """Figures over all ranks and steps; starts again from zero. A collective call."""
        total = self._total()
        self.rows, self.before = [self._row()], None
        self.digest = digest(total[self.slices["digest"]])
        return figures(self.terms, {name: total[part] for name, part in self.slices.items()})

    def state(self) -> dict[str, list[float]]:
        """The sums over all ranks and steps by name, for a checkpoint between two lines. A collective call."""
        total = self._total()
        return {name: total[part].tolist() for name, part in self.slices.items()}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `state` returned."""
        self.before = torch.zeros(self.size, dtype=torch.float64)
        for name, values in state.items():
            self.before[self.slices[name]] = torch.tensor(values, dtype=torch.float64)

    def _total(self) -> Tensor:
        """[size] on the host."""
        rows = torch.stack(self.rows)
        dist.all_reduce(rows, group=self.layout.world)
        rows = rows.cpu()  # one copy, as the host waits for each
        total = rows.where(rows.isfinite().all(1, keepdim=True), 0.0).sum(0)
        return total if self.before is None else total + self.before
