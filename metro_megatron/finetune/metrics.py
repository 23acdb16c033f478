"""How good predictions are, by scikit-learn and SciPy; what these leave undefined is 0."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_CHUNK_TAG = re.compile(r"O|[BIESLU]-.+")


def classification_scores(predicted: NDArray[np.integer], labels: NDArray[np.integer]) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur in either, Matthews correlation, F1 of class 1 alone."""
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(labels, predicted)),
        "f1": float(f1_score(labels == 1, predicted == 1, zero_division=0)),
    }


def multi_label_scores(predicted: NDArray[np.bool_], labels: NDArray[np.bool_]) -> dict[str, float]:
    """F1 over all decisions and averaged over labels, and the share of rows that are right as a whole; [B, classes]."""
    return {
        "micro_f1": float(f1_score(labels, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "exact": float(accuracy_score(labels, predicted)),
    }


def correlations(predicted: NDArray[np.floating], labels: NDArray[np.floating]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant or not finite."""
    x, y = predicted.astype(np.float64), labels.astype(np.float64)
    if not np.isfinite(x).all() or len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic)}


def are_chunk_tags(tags: Sequence[str]) -> bool:
    """Whether tags mark spans: O, B-NAME, I-NAME, also E- and S-, or L- and U-."""
    return all(_CHUNK_TAG.fullmatch(tag) for tag in tags) and any(tag != "O" for tag in tags)


def chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(name, first word, word after the last) of every span, cut as conlleval does it: an I after O opens one too."""
    found, begin, before, name = set(), 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        opens = prefix != "O" and (prefix in "BSU" or before in "OESLU" or kind != name)
        if before != "O" and (prefix == "O" or opens):
            found.add((name, begin, i))
        if opens:
            begin = i
        before, name = prefix, kind
    return found


def chunk_scores(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of spans that are right in name, begin and end, over all sentences."""
    pairs = [(chunks(one), chunks(other)) for one, other in zip(predicted, labels, strict=True)]
    correct = sum(len(one & other) for one, other in pairs)
    guessed, true = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return {
        "span_f1": 2 * correct / (guessed + true) if correct else 0.0,
        "precision": correct / guessed if correct else 0.0,
        "recall": correct / true if correct else 0.0,
    }
