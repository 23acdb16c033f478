"""What a model gets that has learned nothing but frequencies: the marks that losses are compared with."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class WordFrequencies:
    """Entropy of the masked words of a run, counted as they go by: the loss of a model that knows only these."""

    def __init__(self, vocab_size: int):
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)

    def add(self, targets: NDArray[np.int64]) -> None:
        self.counts += np.bincount(targets, minlength=len(self.counts))[: len(self.counts)]

    def entropy(self) -> float:
        """In nats, with the correction of Miller and Madow for words that few counts have not shown yet."""
        counts = self.counts[self.counts > 0]
        total = int(counts.sum())
        if not total:
            return 0.0
        shares = counts / total
        return float(-(shares * np.log(shares)).sum()) + (len(counts) - 1) / (2 * total)


def detection_entropy(replace_rate: float) -> float:
    """Loss in nats of a detector that gives every token the share of replaced ones."""
    p = min(max(replace_rate, 1e-12), 1 - 1e-12)
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def chance_of_auc(replaced: float, original: float) -> float:
    """Standard deviation of the area under the curve of a detector that guesses, from so many of either."""
    return math.sqrt((replaced + original + 1) / (12 * max(replaced, 1.0) * max(original, 1.0)))
