"""Scores against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from metro_megatron.finetune.tasks.classification import classification_scores


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("size", [1, 5, 200])
def test_equal_to_scikit_learn(classes: int, size: int) -> None:
    generator = np.random.default_rng(classes * 1000 + size)
    labels = generator.integers(classes, size=size)
    predicted = np.where(generator.random(size) < 0.6, labels, generator.integers(classes, size=size))
    assert classification_scores(predicted, labels) == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "mcc": matthews_corrcoef(labels, predicted),
        }
    )


def test_one_class_predicted() -> None:
    scores = classification_scores(np.zeros(4, dtype=np.int64), np.array([0, 1, 0, 1]))
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "mcc": 0.0}
