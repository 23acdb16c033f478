"""Scores of answers in words, by the rules of SQuAD's public evaluation scripts, as fractions of 1."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """What was found in a context, "" for nothing, and how much better no answer scores than it."""

    text: str
    no_answer: float


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """Lower case, without ASCII punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 if it is, normalized, one of the answers."""
    return float(any(normalized(prediction) == normalized(gold) for gold in golds))


def word_f1(prediction: str, golds: Sequence[str], empty_equal: bool) -> float:
    """The highest F1 of words with any of the answers.

    Where a side has no words, version 1.1 gives 0, and 2.0 (`empty_equal`) gives 1 if neither has.
    """
    return max(_word_f1(normalized(prediction).split(), normalized(gold).split(), empty_equal) for gold in golds)


def scored_answers(golds: Sequence[str]) -> list[str]:
    """Version 2.0's: those that have words; where there is none, the empty answer is the right one."""
    return [gold for gold in golds if normalized(gold)] or [""]


def best_threshold(
    scores: Sequence[float], answers: Sequence[Answer], has_answer: Sequence[bool]
) -> tuple[float, float]:
    """The best mean score, and the threshold that gives it: questions whose `no_answer` lies above get no answer.

    `scores` are those of the answers where none is withheld. Version 2.0's search: beginning with none, answers are
    given in the order of no_answer, and the one to a question that has none costs as much as that question gave.
    """
    current = float(sum(not one for one in has_answer))
    best, threshold = current, 0.0
    for i in sorted(range(len(answers)), key=lambda one: answers[one].no_answer):
        current += scores[i] if has_answer[i] else -bool(answers[i].text)
        if current > best:
            best, threshold = current, answers[i].no_answer
    return best / len(answers), threshold


def _word_f1(predicted: list[str], gold: list[str], empty_equal: bool) -> float:
    if not predicted or not gold:
        return float(empty_equal and predicted == gold)
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold))
