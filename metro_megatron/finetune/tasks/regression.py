"""Every text, or pair of texts, has a number."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, mixed_kinds, read_labelled_texts
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts


class Regression(Task[LabelledTexts[float]]):
    """Mean squared error between the one logit and the number as it is written."""

    name = "regression"
    makes = "regressor"
    head = "sequence_classification"
    score_names = ("pearson", "spearman")
    usage = 'transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)'

    @staticmethod
    def read_examples(path: Path) -> LabelledTexts[float]:
        return read_labelled_texts(path, number_label)

    def settings(self) -> dict[str, Any]:
        problems = mixed_kinds(self.train, self.validation)
        if len(set(self.train.labels)) < 2:
            one = self.train.labels[0]
            problems.append(f"all {len(self.train)} training texts have the label {one:g}; regression needs two")
        if problems:
            raise UserError(problems)
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: LabelledTexts[float]) -> Encoded:
        return encode_texts(tokenizer, examples, examples.labels)

    def describe_labels(self) -> str:
        return f"labels from {min(self.train.labels):g} to {max(self.train.labels):g}"

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        predicted, labels = outputs[0][:, 0], np.array(self.validation.labels)
        return {"pearson": correlation(predicted, labels), "spearman": correlation(ranks(predicted), ranks(labels))}

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        pairs = zip(self.validation.labels, outputs[0][:, 0].tolist(), strict=True)
        return [{"label": label, "prediction": prediction} for label, prediction in pairs]


def number_label(value: Any) -> float:
    """A label as it stands in a file, as a finite number. Raises UserError."""
    if value is None or value == "":
        raise UserError("has no label")
    # float() alone would take 1_0 and true.
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool) and "_" not in str(value)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"label {value!r} is not a finite number; regression learns numbers, classification names")
    return number


def correlation(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Pearson's correlation; 0 where undefined, because one of the two is constant or not finite."""
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    a, b = (one.astype(np.float64) - one.mean(dtype=np.float64) for one in (x, y))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rank of every value from 1; equal values share the mean of their ranks (Spearman correlates these)."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[number]
