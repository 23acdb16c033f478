"""What else a trained model is asked: further sets of its task, scored where they have labels, and predicted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from metro_megatron.finetune.task import Outputs, Row, Task

LABELS = ("label", "labels", "start_positions")
"""What a row of labelled examples has one of."""


@dataclass(frozen=True)
class Asked:
    """What came of one set."""

    scores: dict[str, float]
    """Nothing where there are no labels."""
    predictions: list[dict[str, Any]]


def ask_others(
    task: Task[Any], tokenizer: PreTrainedTokenizerFast, predict: Callable[[list[Row]], Outputs]
) -> dict[str, Asked]:
    """Every one of `task.others` by its name; `predict` gives the model's outputs for rows, in their order."""
    found = {}
    for name, other in task.others.items():
        rows = other.encode(tokenizer, other.validation).rows
        outputs = predict(rows)
        scores = other.scores(outputs, rows) if any(key in rows[0] for key in LABELS) else {}
        found[name] = Asked({key: scores[key] for key in other.score_names if scores}, other.predictions(outputs, rows))
    return found
