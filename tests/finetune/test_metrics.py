"""Scores against hand-computed cases."""

import numpy as np
import pytest

from metro_megatron.finetune.metrics import (
    are_chunk_tags,
    chunk_scores,
    chunks,
    classification_scores,
    multi_label_scores,
)


def test_classification_by_hand() -> None:
    # Confusion (rows: labels) [[3, 1], [1, 1]]: covariance 4*6 - (4*4 + 2*2) = 4, spreads 36 - 20 = 16 each.
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 0, 1])
    assert classification_scores(predicted, labels) == pytest.approx(
        {"accuracy": 4 / 6, "macro_f1": (6 / 8 + 2 / 4) / 2, "mcc": 4 / 16, "f1": 2 / 4}
    )


def test_macro_f1_is_of_the_classes_that_occur_in_either() -> None:
    # Class 0: 2*1/(2+1); class 1: 2*1/(1+2); class 3, which is only predicted: 0. Class 2 is nowhere.
    scores = classification_scores(np.array([0, 1, 1, 3]), np.array([0, 0, 1, 1]))
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_one_class_predicted() -> None:
    scores = classification_scores(np.zeros(4, dtype=np.int64), np.array([0, 1, 0, 1]))
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "mcc": 0.0, "f1": 0.0}


def test_multi_label_by_hand() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=bool)
    predicted = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=bool)
    # Right 3 of 5 said and 4 true; by label 2*1/(2+2), 2*2/(2+2), nothing true and one said.
    assert multi_label_scores(predicted, labels) == pytest.approx(
        {"micro_f1": 2 * 3 / (5 + 4), "macro_f1": (1 / 2 + 1 + 0) / 3, "exact": 2 / 4}
    )


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-P I-P O B-L", {("P", 0, 2), ("L", 3, 4)}),
        ("O I-P I-P O", {("P", 1, 3)}),  # IOB1, or a slip: an I after O opens
        ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
        ("B-P I-L I-L", {("P", 0, 1), ("L", 1, 3)}),
        ("S-P B-L E-L O I-P E-P S-P", {("P", 0, 1), ("L", 1, 3), ("P", 4, 6), ("P", 6, 7)}),
        ("U-P B-L I-L L-L", {("P", 0, 1), ("L", 1, 4)}),
        ("O O", set()),
        ("", set()),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_spans_are_cut_as_conlleval_does(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert chunks(tags.split()) == found


def test_span_f1_by_hand() -> None:
    labels = [["B-P", "I-P", "O", "B-L"], ["O", "B-P", "O"]]
    predicted = [["B-P", "I-P", "O", "B-P"], ["O", "B-P", "I-P"]]
    assert chunk_scores(predicted, labels) == pytest.approx({"span_f1": 2 / 6, "precision": 1 / 3, "recall": 1 / 3})
    assert chunk_scores([["O"]], [["B-P"]]) == {"span_f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_which_tags_mark_spans() -> None:
    assert are_chunk_tags(["O", "B-P", "I-P"])
    assert not are_chunk_tags(["O"]) and not are_chunk_tags(["NN", "B", "O"]) and not are_chunk_tags(["0", "1"])
