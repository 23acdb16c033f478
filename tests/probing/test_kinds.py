"""Scores of every kind of task against scikit-learn and by hand."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef, ndcg_score

from metro_megatron.probing.kinds import GAP, KINDS, matthews, span_scores, spans_of


def by_first_feature(train: Any, classes: Any, test: Any, num_classes: int) -> Any:
    """A classifier for tests: the first feature is the class."""
    return np.eye(num_classes)[test[:, 0].astype(int)]


def test_matthews_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    for size in (2, 3, 5):
        labels, guessed = (rng.integers(0, size, 50).astype(str).tolist() for _ in range(2))
        assert matthews(labels, guessed) == pytest.approx(matthews_corrcoef(labels, guessed))
    assert matthews(["a", "b"], ["a", "a"]) == 0.0


def test_classification() -> None:
    kind = KINDS["classification"]
    rows = [{"text": "x", "label": label} for label in "abba"]
    found = kind.scores(rows, np.zeros((4, 1)), rows, np.array([[0.0], [1], [0], [0]]), by_first_feature)
    assert found.items == [1, 1, 0, 1]
    assert found.figures == {"mcc": pytest.approx(matthews_corrcoef([0, 1, 1, 0], [0, 1, 0, 0])), "accuracy": 0.75}


def test_pairs_are_compared_by_distance_and_product() -> None:
    kind = KINDS["pairs"]
    rows = [{"text_a": "u", "text_b": "v", "label": label} for label in "ab"]
    assert kind.texts(rows) == [["u"], ["v"], ["u"], ["v"]]
    seen: list[np.ndarray] = []

    def classify(train: np.ndarray, classes: Any, test: Any, num_classes: int) -> np.ndarray:
        seen.append(train)
        return np.eye(2)

    features = np.array([[1.0, 2], [3, 5], [4, 0], [1, 1]])
    assert kind.scores(rows, features, rows, features, classify).items == [1, 1]
    assert seen[0].tolist() == [[2, 3, 3, 10], [3, 1, 4, 0]]


def test_retrieval_is_ndcg_of_one_right_answer() -> None:
    rng = np.random.default_rng(2)
    rows = [{"text_a": f"q{number}", "text_b": f"d{number // 2}"} for number in range(40)]
    kind = KINDS["retrieval"]
    assert kind.texts(rows)[38:42] == [["q38"], ["q39"], ["d0"], ["d1"]]
    features = rng.normal(size=(60, 3)) + 3
    asked, offered = (part - part.mean(0) for part in (features[:40], features[40:]))
    asked, offered = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (asked, offered))
    right = np.eye(20)[np.arange(40) // 2]
    expected = [ndcg_score([one], [likeness], k=10) for one, likeness in zip(right, asked @ offered.T, strict=True)]
    found = kind.scores([], np.zeros((0, 3)), rows, features, by_first_feature)
    np.testing.assert_allclose(found.items, expected)
    assert found.figures["ndcg10"] == pytest.approx(np.mean(expected))
    assert kind.scores([], np.zeros((0, 3)), rows, np.ones((60, 3)), by_first_feature).figures["ndcg10"] == 0
    every_rank = [ndcg_score([right[0]], [np.roll(np.arange(20), shift)], k=10) for shift in range(20)]
    assert kind.trivial([], rows) == pytest.approx(np.mean(every_rank))


def test_choice_takes_the_rightest_text() -> None:
    kind = KINDS["choice"]
    rows = [{"id": "1", "text": f"a {GAP} c", "choices": ["x", "y", "z"], "answer": answer} for answer in (2, 0)]
    assert kind.texts(rows[:1]) == [["a x c"], ["a y c"], ["a z c"]]
    rightness = np.array([0.1, 0.2, 0.3, 0.1, 0.9, 0.3])

    def classify(train: Any, classes: np.ndarray, test: Any, num_classes: int) -> np.ndarray:
        assert classes.tolist() == [0, 0, 1, 1, 0, 0]
        return np.stack([1 - rightness, rightness], axis=1)

    found = kind.scores(rows, np.zeros((6, 1)), rows, np.zeros((6, 1)), classify)
    assert found.items == [1, 0] and kind.trivial(rows, rows) == pytest.approx(1 / 3)
    assert "has no ___" in (kind.problem({**rows[0], "text": "abc"}) or "")
    assert "answer is 3" in (kind.problem({**rows[0], "answer": 3}) or "") and kind.problem(rows[0]) is None


def test_spans_are_runs_of_one_tag() -> None:
    assert spans_of(list("OaabOba")) == {(1, 3, "a"), (3, 4, "b"), (5, 6, "b"), (6, 7, "a")}
    found = span_scores([list("OaaO"), list("OO"), list("bb")], [list("OaaO"), list("Oa"), list("ab")])
    # Right: one of 2 true and 4 found.
    assert found.figures == {"span_f1": 2 / 6, "accuracy": 6 / 8} and found.items == [1, 0, 0]
    kind = KINDS["spans"]
    rows = [{"words": ["x", "y"], "tags": ["O", "a"]}, {"words": ["z"], "tags": ["O"]}]
    assert kind.texts(rows) == [["x", "y"], ["z"]] and kind.trivial(rows, rows) == 0
    found = kind.scores(rows, np.zeros((3, 1)), rows, np.array([[0.0], [1], [0]]), by_first_feature)
    assert found.items == [1, 1] and "2 words and 1 tags" in (kind.problem({"id": "1", **rows[0], "tags": ["O"]}) or "")
