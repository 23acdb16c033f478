"""What a run of a sweep has come to: its scores, and whether it has failed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.finetune.sweep.plan import Run

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Outcome:
    """A run that has ended."""

    run: Run
    scores: Mapping[str, float]
    """By name, the one that models are compared by first; empty where it did not come to its end."""
    failure: str = ""
    """Why it counts as failed: it ended early, a loss or score is no number, or every text got one answer."""
    majority_share: float | None = None
    """Of the commonest class: the accuracy of always saying it. None where labels are no classes."""


def read_outcome(run: Run, folder: Path) -> Outcome:
    """Of a finished run's folder. Raises UserError where its files are damaged, as a disk that was full leaves them."""
    try:
        metrics: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        scores = {name: float(metrics[name]) for name in metrics["score_names"]}
        numbers = [*scores.values(), *(value for epoch in metrics.get("epochs", []) for value in epoch.values())]
        lines = read_predictions(folder / PREDICTIONS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: damaged ({type(error).__name__}: {error}); remove it, and the run is done again"
        ) from error
    is_finite = all(map(math.isfinite, numbers))
    failure = one_answer(lines) if is_finite else "a loss or score is no finite number"
    return Outcome(run, scores, failure, metrics.get("majority_share"))


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of predictions."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def one_answer(lines: Iterable[Mapping[str, Any]]) -> str:
    """What is wrong if all predictions are the same while labels are not; else an empty string. Tags count singly."""
    labels: set[str] = set()
    predictions: set[str] = set()
    unit = "text"
    for line in lines:
        label, prediction = [line.get("label")], [line["prediction"]]
        if "tokens" in line:
            label, prediction, unit = line.get("label", []), line["prediction"], "word"
        labels.update(map(json.dumps, label))
        predictions.update(map(json.dumps, prediction))
    if len(predictions) == 1 and len(labels) > 1:
        return f"every {unit} got the answer {predictions.pop()}"
    return ""
