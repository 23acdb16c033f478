"""How long documents and units are: histograms that can be added up."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LAST_POWER = 62
EDGES: NDArray[np.int64] = np.unique(np.ceil(2.0 ** (np.arange(_LAST_POWER + 1) / 2)).astype(np.int64))
"""Bin k holds lengths from EDGES[k] to below EDGES[k + 1]: powers of the square root of 2, rounded up."""


@dataclass(frozen=True)
class LengthHistogram:
    """Counts of lengths of at least 1, in bins between EDGES."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES), np.int64))

    @classmethod
    def from_lengths(cls, lengths: ArrayLike) -> "LengthHistogram":
        """Of lengths [n] in tokens."""
        places = np.searchsorted(EDGES, np.asarray(lengths), side="right") - 1
        return cls(np.bincount(places, minlength=len(EDGES)).astype(np.int64))

    def __add__(self, other: "LengthHistogram") -> "LengthHistogram":
        return LengthHistogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LengthHistogram) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """How many lengths were counted."""
        return int(self.counts.sum())

    def to_json(self) -> dict[str, int]:
        """Count by the smallest length of a bin, empty bins left out."""
        return {str(edge): count for edge, count in zip(EDGES.tolist(), self.counts.tolist(), strict=True) if count}

    @classmethod
    def from_json(cls, content: dict[str, int]) -> "LengthHistogram":
        """What to_json gave."""
        histogram = cls()
        for edge, count in content.items():
            histogram.counts[np.searchsorted(EDGES, int(edge))] = count
        return histogram
