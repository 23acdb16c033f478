"""Scores of classifiers from counts of (true class, predicted class)."""

import numpy as np
from numpy.typing import NDArray


def classification_scores(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur in either, and Matthews correlation (0 where undefined)."""
    size = int(max(predicted.max(), labels.max())) + 1
    counts = np.zeros((size, size))
    np.add.at(counts, (labels, predicted), 1)
    correct, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = true + guessed > 0
    total = counts.sum()
    covariance = correct.sum() * total - true @ guessed
    spread = np.sqrt((total**2 - true @ true) * (total**2 - guessed @ guessed))
    return {
        "accuracy": float(correct.sum() / total),
        "macro_f1": float((2 * correct[occurs] / (true + guessed)[occurs]).mean()),
        "mcc": float(covariance / spread) if spread else 0.0,
    }
