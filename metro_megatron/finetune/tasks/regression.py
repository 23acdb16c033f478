"""Every text, or pair of texts, has a number."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, mixed_kinds, read_labelled_texts, with_ids
from metro_megatron.finetune.metrics import correlations
from metro_megatron.finetune.tables import PLAIN, Layout
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts

_LARGEST = float(np.finfo(np.float32).max)


class Regression(Task[LabelledTexts[float]]):
    """Mean squared error between the one logit and the number as it is written."""

    name = "regression"
    makes = "regressor"
    head = "sequence_classification"
    own_scores = ("pearson", "spearman")
    usage = 'transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)'

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> LabelledTexts[float]:
        return read_labelled_texts(path, number_label, layout, is_labelled)

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
        return correlations(outputs[0][:, 0], np.array(self.validation.labels))

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return with_ids([{"prediction": number} for number in outputs[0][:, 0].tolist()], self.validation)

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        numbers = outputs[0][:, 0]
        return (
            ["the model gives all validation texts the same number"] if np.ptp(numbers) == 0 < len(numbers) - 1 else []
        )


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
    if not abs(number) <= _LARGEST:
        raise UserError(
            f"label {value!r} is not a finite number, written with a point, within FP32; regression learns numbers, "
            "classification names"
        )
    return number
