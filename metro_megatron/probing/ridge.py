"""Linear classifiers in closed form: ridge regression on classes, its penalty chosen by leaving one out.

Legend: n examples to learn from, m to score, d features, C classes.
"""

import numpy as np
from numpy.typing import NDArray

PENALTIES = 10.0 ** np.arange(-4, 4)
"""Tried, as multiples of the features' mean eigenvalue."""


def ridge_scores(
    train: NDArray[np.floating], classes: NDArray[np.int64], test: NDArray[np.floating], num_classes: int
) -> NDArray[np.float64]:
    """Scores [m, C] for test [m, d] of a classifier of train [n, d] and classes [n], each below C; the largest wins.

    Features are standardized by train. Of the penalties the one whose squared error is least when every example is
    predicted without itself (exact for ridge regression, from one eigendecomposition; the mean is left in). A pure
    function of its arguments in float64.
    """
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    deviation[deviation == 0] = 1.0
    known, asked = (train - mean) / deviation, (test - mean) / deviation
    targets = np.eye(num_classes)[classes]
    base = targets.mean(0)
    targets = targets - base
    values, vectors = _directions(known)
    rotated = known @ vectors
    pulls = rotated.T @ targets
    squares = rotated**2
    unit = float(values.mean()) if len(values) else 1.0

    def error(penalty: float) -> float:
        shrunk = 1.0 / (values + penalty * unit)
        leverage = squares @ shrunk + 1.0 / len(known)
        residual = targets - rotated @ (shrunk[:, None] * pulls)
        return float(((residual / (1.0 - leverage).clip(min=1e-6)[:, None]) ** 2).sum())

    best = min(PENALTIES.tolist(), key=error)
    return base + asked @ (vectors @ (pulls / (values + best * unit)[:, None]))


def _directions(known: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues of known^T known that are not 0, and their vectors [d, values], by the smaller of two matrices."""
    count, width = known.shape
    values, vectors = np.linalg.eigh(known.T @ known if width <= count else known @ known.T)
    kept = values > 1e-12 * max(float(values[-1]), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if width <= count else known.T @ (vectors / np.sqrt(values))
