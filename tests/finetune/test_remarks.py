"""A run whose model tells nothing apart says so beside its scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedConfig

from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.lesson import Lesson
from metro_megatron.finetune.questions import Question
from metro_megatron.finetune.task import Encoded, Task
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.tasks.multi_label import MultiLabel
from metro_megatron.finetune.tasks.multiple_choice import Choice, MultipleChoice
from metro_megatron.finetune.tasks.regression import Regression
from metro_megatron.finetune.tasks.span import Span
from metro_megatron.finetune.tasks.token import TaggedWords, Token


def texts(*labels: Any) -> LabelledTexts:
    return LabelledTexts([f"text {i}" for i in range(len(labels))], None, list(labels))


def both(kind: type[Task[Any]], examples: Any) -> Task[Any]:
    return kind(examples, examples)


WORDS = [TaggedWords(("a", "b"), ("O", "O")), TaggedWords(("c", "d"), ("X", "O"))]
CHOICES = [Choice("a", ("x", "y"), label) for label in (1, 1, 0)]
QUESTIONS = [Question("q", "a b", (("a", 0),)), Question("q", "b a", (("b", 0),))]
TWO_TOKENS = {"p_mask": np.array([0, 1, 0, 0]), "offsets": [(0, 0), (0, 0), (0, 1), (2, 3)]}
FIRST_WORDS = [{"firsts": [1, 2]}] * 2

CASES: dict[str, tuple[Task[Any], list[dict[str, Any]], tuple[Any, ...], str, tuple[Any, ...]]] = {
    # Outputs that tell apart, what is said of others, and outputs that do not.
    "classification": (
        both(Classification, texts("b", "b", "b", "a")),
        [],
        (np.eye(2)[[0, 1, 1, 1]],),
        "'b' for every one of the validation texts would have an accuracy of 0.7500",
        (np.eye(2)[[1, 1, 1, 1]],),
    ),
    "multi_label": (
        both(MultiLabel, texts(("a", "b"), ("b", "a"), ("a",))),
        [],
        (np.array([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]),),
        "a, b for every one of the validation texts would be exactly right in 0.6667",
        (np.ones((3, 2)),),
    ),
    "token": (
        both(Token, WORDS),
        FIRST_WORDS,
        (np.eye(2)[[[0, 0, 0, 0], [0, 1, 0, 0]]],),
        "'O' for every validation word would have an accuracy of 0.7500",
        (np.eye(2)[[[0, 0, 0, 0], [0, 0, 0, 0]]],),
    ),
    "multiple_choice": (
        both(MultipleChoice, CHOICES),
        [],
        (np.eye(2)[[0, 1, 1]],),
        "choice 1 for every one of the validation texts would have an accuracy of 0.6667",
        (np.eye(2)[[1, 1, 1]],),
    ),
    "regression": (both(Regression, texts(0.5, 1.0)), [], (np.array([[0.5], [1.0]]),), "", (np.ones((2, 1)),)),
    "span": (
        both(Span, QUESTIONS),
        [{**TWO_TOKENS, "question": number} for number in range(2)],
        (np.array([[0, 0, 1, 0], [0, 0, 1, 0]]), np.array([[0, 0, 1, 0], [0, 0, 1, 0]])),
        "",
        (np.array([[0, 0, 1, 0], [0, 0, 0, 1]]), np.array([[0, 0, 1, 0], [0, 0, 0, 1]])),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_remarked(name: str) -> None:
    task, rows, apart, majority, alike = CASES[name]
    expected = [majority] if majority else []
    assert task.remarks(apart, rows) == expected
    (*first, remark) = task.remarks(alike, rows)
    assert first == expected
    assert remark.startswith("the model ")
    if "majority_share" in task.facts():
        assert majority.endswith(f"{task.facts()['majority_share']:.4f}")


@pytest.mark.parametrize(
    ("loss", "answer", "is_named"), [(0.5, 1.0, False), (float("inf"), 1.0, True), (0.5, np.nan, True)]
)
def test_a_model_that_has_diverged_is_named(loss: float, answer: float, is_named: bool) -> None:
    rows = Encoded([{"label": 1}, {"label": 0}], 0)
    tokenizer: Any = None
    lesson = Lesson(both(Classification, texts("b", "a")), PreTrainedConfig(), tokenizer, Path(), rows, rows)
    outputs = (np.array([[0.0, answer], [answer, 0.0]], dtype=np.float32),)
    remarks = lesson.facts({"accuracy": 0.5, "loss": loss}, outputs, {})["remarks"]
    assert remarks[0].startswith("the loss of validation, or what the model answers, is no finite number") == is_named
