"""Points of the grid: medians over seeds, and the point that is best by them (METRO section 5).

A failed run stands below all others in a median, whatever its scores are: a point that fails with half of its seeds has
none. Leaving failed seeds out would make unstable points look good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from metro_megatron.finetune.sweep.outcome import Outcome
from metro_megatron.finetune.sweep.plan import SEED, TASK

Values = tuple[tuple[str, Any], ...]
"""Names of options with their values, in the order of the command line."""


@dataclass(frozen=True)
class Point:
    """Equal runs but for their seeds."""

    row: Values
    """Of the options that make rows of the table."""
    task: str
    choice: Values
    """Of the options that are picked."""
    outcomes: Sequence[Outcome]
    """A seed each."""

    @cached_property
    def score_names(self) -> list[str]:
        """The first one is what points are compared by; empty where no run has come to its end."""
        return next((list(one.scores) for one in self.outcomes if one.scores), [])

    @property
    def good(self) -> list[Outcome]:
        """Those that have not failed."""
        return [one for one in self.outcomes if not one.failure]

    def scores(self, name: str) -> list[float]:
        """Of the runs that have not failed."""
        return [one.scores[name] for one in self.good]

    def median(self, name: str) -> float | None:
        """Over all seeds; None where that is a failed one."""
        found = median([*self.scores(name), *[-math.inf] * (len(self.outcomes) - len(self.good))])
        return found if math.isfinite(found) else None

    @property
    def best(self) -> Outcome | None:
        """The run with the best first score; None where all have failed."""
        return max(self.good, key=lambda one: one.scores[self.score_names[0]], default=None)

    @property
    def main_median(self) -> float:
        """What points are compared by."""
        found = self.median(self.score_names[0]) if self.score_names else None
        return -math.inf if found is None else found


def points(outcomes: Iterable[Outcome], varied: Sequence[str], rows: Sequence[str]) -> list[Point]:
    """All points in the order of the runs; `rows` are the options that are not picked but make rows.

    Where several tasks are learned at once, that is a row of its own, in the column of the first.
    """
    groups: dict[tuple[Values, str, Values], list[Outcome]] = {}
    for one in outcomes:
        values = one.run.values
        row = tuple((name, values[name]) for name in rows)
        if one.run.column != values[TASK] and TASK not in rows:
            row += ((TASK, values[TASK]),)
        choice = tuple((name, values[name]) for name in varied if name not in (*rows, SEED, TASK))
        groups.setdefault((row, one.run.column, choice), []).append(one)
    return [Point(*key, found) for key, found in groups.items()]


def picked(found: Iterable[Point]) -> list[Point]:
    """Of every row and task the point with the best median of its first score; of equal ones the first."""
    best: dict[tuple[Values, str], Point] = {}
    for point in found:
        key = (point.row, point.task)
        if key not in best or point.main_median > best[key].main_median:
            best[key] = point
    return list(best.values())
