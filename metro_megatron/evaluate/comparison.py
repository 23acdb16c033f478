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
other items would have changed. Two tables have the sum of their first parts, at the degrees of freedom
(v_a + v_b)^2 / (v_a^2 / n_a + v_b^2 / n_b) - 1. Satterthwaite's (1946) are too few for arms of like variance, and
those of Welch (1947; n + 1 and - 2 instead) too many for others.

The interval is Cochran and Cox's (Experimental Designs, 1957): its quantile is a mean of Student's quantiles for either
part, n - 1 and m - 1 degrees of freedom, weighted by the part's variance, here to the power WEIGHT. Satterthwaite's
degrees of freedom for the whole are too many just where seeds happen to agree: where their part is 8 times the items',
3 seeds had covered 92.2%. Where m is large, at any ratio of the parts, these cover:

    seeds     paired            unpaired          of which one arm has 16 times the variance
    2         93.0 to 96.8      95.0 to 96.8      93.2 to 96.4
    3         95.0 to 96.4      95.0 to 96.4      93.5 to 96.1
    5         95.0 to 96.1      95.0 to 95.9      94.4 to 95.8

Where the arm of fewer seeds varies far more than the other, they cover less: 2 against 5, 87.8%.
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
WEIGHT = 1.4
"""Power of its variance by which a part weighs in the quantile."""


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
    left: tuple[float, ...]
    """Variance of each table: what is left."""

    @property
    def variance(self) -> float:
        """Of the mean, for other seeds and other items."""
        return sum(one.variance for one in self.seeds) + self.item_variance

    @property
    def item_variance(self) -> float:
        """Its part that more seeds do not lower."""
        return max(0.0, self.items.variance - sum(self.left))

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    def quantile(self, share: float) -> float:
        """As quantile, of what is known."""
        return float(quantile(share, self.seeds, Component(self.item_variance, self.items.freedom)))

    @property
    def half_width(self) -> float:
        """Of the interval of CONFIDENCE around the mean."""
        return self.quantile((1 + CONFIDENCE) / 2) * self.standard_error if self.variance else 0.0

    @property
    def is_verdict(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half_width

    def with_more(self, seeds: int) -> Difference:
        """What is expected of so many seeds more in each table, of the same scores."""
        falls = [(one.freedom + 1) / (one.freedom + 1 + seeds) for one in self.seeds]
        more = tuple(
            Component(one.variance * fall, one.freedom + seeds) for one, fall in zip(self.seeds, falls, strict=True)
        )
        left = tuple(own * fall for own, fall in zip(self.left, falls, strict=True))
        items = max(0.0, self.items.variance - sum(self.left) + sum(left))
        return Difference(self.mean, more, Component(items, self.items.freedom), left)


def quantile(share: float, seeds: Sequence[Component], items: Component) -> float:
    """Of the mean over its standard error, where there is no difference, by what seeds and other items are of it.

    Not both are of variance 0.
    """
    from scipy.stats import t

    total = sum(one.variance for one in seeds)
    none = total == 0  # weighs nothing, whatever its degrees of freedom
    shares = [(one.variance + none) / (total + none * len(seeds)) for one in seeds]
    freedom = 1 / sum(own**2 / (one.freedom + 1) for own, one in zip(shares, seeds, strict=True)) - 1
    weights = [(part / (total + items.variance)) ** WEIGHT for part in (total, items.variance)]
    quantiles = [t.ppf(share, one) for one in (freedom, items.freedom)]
    return (weights[0] * quantiles[0] + weights[1] * quantiles[1]) / sum(weights)


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
    return next((more for more in range(1, MOST_SEEDS - now) if _is_found(found.with_more(more))), None)


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, spread (largest minus smallest), and standard error of the mean: NaN of one value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.median(values)), float(np.ptp(values)), float(error)


def _left(table: NDArray[np.float64]) -> float:
    seeds, items = table.shape
    residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((residual**2).sum()) / ((seeds - 1) * (items - 1) * seeds * items)


def _is_found(expected: Difference) -> bool:
    """Whether POWER of all campaigns with this variance have a verdict."""
    quantiles = expected.quantile((1 + CONFIDENCE) / 2) + expected.quantile(POWER)
    return abs(expected.mean) >= quantiles * expected.standard_error
