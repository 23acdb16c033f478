"""SQuAD's rules on hostile answers; every value is computed by hand from the public scripts."""

import pytest

from metro_megatron.finetune.answers import Answer, best_threshold, exact_match, normalized, scored_answers, word_f1


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        ("The  Cat's-house, an\tend.", "catshouse end"),
        ("theory of A an", "theory of"),
        ("a", ""),
        ("...!", ""),
        ("U.S.", "us"),
        ("the-cat", "thecat"),  # punctuation goes first, so that no article is left
        ("“Zoë” – 東京", "“zoë” – 東京"),  # only ASCII punctuation goes
        ("ÀN an", "àn"),
        ("", ""),
    ],
)
def test_normalized(answer: str, bare: str) -> None:
    assert normalized(answer) == bare


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1", "f1_of_1_1"),
    [
        ("the cat", ["A cat!"], 1, 1, 1),
        ("old cat", ["the cat", "green bird"], 0, 2 / 3, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3, 2 / 3),  # words count as often as both have them
        ("dog", ["cat", "old dog", "dog"], 1, 1, 1),
        ("the", ["an"], 1, 1, 0),  # nothing is left of either: version 1.1 finds no word in common
        ("the", ["cat"], 0, 0, 0),
        ("", ["cat"], 0, 0, 0),
        ("", [""], 1, 1, 0),
        ("cat", [""], 0, 0, 0),
        ("Zoë", ["zoë"], 1, 1, 1),
        ("Zoe\u0308", ["Zoë"], 0, 0, 0),  # no Unicode normalization
    ],
)
def test_exact_match_and_f1(prediction: str, golds: list[str], exact: float, f1: float, f1_of_1_1: float) -> None:
    assert exact_match(prediction, golds) == exact
    assert word_f1(prediction, golds, True) == pytest.approx(f1)
    assert word_f1(prediction, golds, False) == pytest.approx(f1_of_1_1)


def test_answers_without_words_are_none() -> None:
    assert scored_answers(["the", "cat", "a."]) == ["cat"]
    assert scored_answers(["the", "."]) == [""]
    assert scored_answers([]) == [""]


def test_the_best_threshold() -> None:
    # By no_answer: right (0.5), right (1), wrong question without answer, right (1), nothing found where there is none.
    answers = [Answer("c", 2.0), Answer("a", -3.0), Answer("b", -2.0), Answer("x", -1.0), Answer("", 5.0)]
    scores, has_answer = [1.0, 0.5, 1.0, 0.0, 0.0], [True, True, True, False, False]
    # None: 2 of 5; then 2.5, 3.5, 2.5, 3.5, 3.5.
    assert best_threshold(scores, answers, has_answer) == (3.5 / 5, -2.0)
    assert best_threshold([0.0], [Answer("x", 1.0)], [False]) == (1.0, 0.0)
    assert best_threshold([1.0], [Answer("x", 1.0)], [True]) == (1.0, 1.0)
