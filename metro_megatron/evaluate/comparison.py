"""Does one way of pretraining score higher than another? An interval for the difference, from runs of several seeds.

Scores of an arm are a table [n, m] of n seeds and m items, both drawn from more of their kind:

    score = mean + seed + item + what is left, each with its variance.

Items of a run share what its seed did to it, so n times m scores are far fewer than as many independent ones: it is
seeds that are repeated. Arms of the same seeds share order, masks, noise and initial weights. They are compared by
their differences, one table, in which seed and item mean what both do to the difference. Arms of different seeds are
two tables, of the same items.

With mean squares MS between seeds, between items and of what is left, one table's mean has the variance

    MS_seed / nm + max(0, MS_item - MS_left) / nm.

The first part is that of the t interval over the seeds' means, and is there whatever the items are; the second is what
other items would have changed. Degrees of freedom are Satterthwaite's (1946), for a combination of mean squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.8
"""Share of campaigns that would find a difference of the size seen, with as many seeds as are said to be needed."""
MOST_SEEDS = 1000
"""Nobody trains more."""


@dataclass(frozen=True)
class Component:
    """A mean square's part in the variance of the difference."""

    variance: float
    freedom: float
    """Degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """The mean of A minus that of B, and what is known of its variance."""

    mean: float
    seeds: tuple[Component, ...]
    """Of each table: between its seeds. Falls with the number of seeds."""
    items: Component
    """Between items, of the means over seeds; what is left is part of it."""
    left: tuple[Component, ...]
    """Of each table: what is left."""

    @property
    def variance(self) -> float:
        """Of the mean, for other seeds and other items."""
        return sum(one.variance for one in self.seeds) + self.item_variance

    @property
    def item_variance(self) -> float:
        """Its part that more seeds do not lower."""
        return max(0.0, self.items.variance - sum(one.variance for one in self.left))

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    @property
    def freedom(self) -> float:
        """Satterthwaite's, of the variance."""
        parts = [*self.seeds, *((self.items, *self.left) if self.item_variance else ())]
        spread = sum(one.variance**2 / one.freedom for one in parts)
        return self.variance**2 / spread if spread else math.inf

    @property
    def half_width(self) -> float:
        """Of the interval of CONFIDENCE around the mean."""
        return _quantile((1 + CONFIDENCE) / 2, self.freedom) * self.standard_error if self.variance else 0.0

    @property
    def is_verdict(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half_width

    def with_seeds(self, factor: float) -> Difference:
        """What is expected of so many times the seeds, of the same scores."""

        def more(one: Component) -> Component:
            return Component(one.variance / factor, (one.freedom + 1) * factor - 1)

        left = tuple(Component(one.variance / factor, one.freedom * factor) for one in self.left)
        gone = sum(one.variance for one in self.left) - sum(one.variance for one in left)
        items = Component(max(0.0, self.items.variance - gone), self.items.freedom)
        return Difference(self.mean, tuple(map(more, self.seeds)), items, left)


def difference(*tables: NDArray[np.float64]) -> Difference:
    """Of one table [n, m] of A - B by seed and item, or of two, A's and minus B's, with the same items.

    A table needs two seeds and two items at least.
    """
    of_items = sum(table.mean(axis=0) for table in tables)
    num_items = tables[0].shape[1]
    return Difference(
        float(sum(table.mean() for table in tables)),
        tuple(Component(float(table.mean(axis=1).var(ddof=1)) / len(table), len(table) - 1) for table in tables),
        Component(float(np.var(of_items, ddof=1)) / num_items, num_items - 1),
        tuple(map(_left, tables)),
    )


def variance_ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Variance of the mean difference of seeds that are paired, over what it were with others for B; NaN: of nothing.

    a and b are [n, m] with equal seeds. Below 1, common random numbers have helped.
    """
    unpaired = difference(a, -b).variance
    return difference(a - b).variance / unpaired if unpaired else math.nan


def more_seeds(found: Difference) -> int | None:
    """How many more of each arm a verdict needs, if the difference is what was seen: at POWER.

    0 where there is one; None where no number of seeds below MOST_SEEDS is enough: the items are too few, or there is
    no difference.
    """
    if found.is_verdict:
        return 0
    if not found.mean:
        return None
    now = round(min(one.freedom for one in found.seeds)) + 1
    return next((n - now for n in range(now + 1, MOST_SEEDS) if _is_found(found.with_seeds(n / now))), None)


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, spread (largest minus smallest), and standard error of the mean: NaN of one value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.median(values)), float(np.ptp(values)), float(error)


def _left(table: NDArray[np.float64]) -> Component:
    seeds, items = table.shape
    residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (seeds - 1) * (items - 1)
    return Component(float((residual**2).sum()) / freedom / (seeds * items), freedom)


def _is_found(expected: Difference) -> bool:
    """Whether POWER of all campaigns with this variance have a verdict."""
    freedom = expected.freedom
    quantiles = _quantile((1 + CONFIDENCE) / 2, freedom) + _quantile(POWER, freedom)
    return abs(expected.mean) >= quantiles * expected.standard_error


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))
