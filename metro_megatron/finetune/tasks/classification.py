"""Every text, or pair of texts, belongs to one class."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, mixed_kinds, read_labelled_texts
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts

_SHOWN_LABELS = 5


class Classification(Task[LabelledTexts[str]]):
    """Cross-entropy over the classes of the training file."""

    name = "classification"
    makes = "classifier"
    head = "sequence_classification"
    score_names = ("accuracy", "macro_f1", "mcc")
    usage = 'transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)'

    @staticmethod
    def read_examples(path: Path) -> LabelledTexts[str]:
        """Labels are strings or integers, kept as they are written."""
        return read_labelled_texts(path)

    @cached_property
    def names(self) -> list[str]:
        """The classes in the order of the logits."""
        return label_names(self.train, self.validation)

    def settings(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
            "problem_type": "single_label_classification",
        }

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: LabelledTexts[str]) -> Encoded:
        number = {name: i for i, name in enumerate(self.names)}
        return encode_texts(tokenizer, examples, [number[label] for label in examples.labels])

    def describe_labels(self) -> str:
        return f"{len(self.names)} classes"

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        (logits,) = outputs
        return classification_scores(logits.argmax(-1), np.array([row["label"] for row in rows]))

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        (logits,) = outputs
        lines = []
        for row, label in zip(torch.from_numpy(logits).softmax(-1).tolist(), self.validation.labels, strict=True):
            prediction = self.names[max(range(len(self.names)), key=row.__getitem__)]
            probabilities = dict(zip(self.names, row, strict=True))
            lines.append({"label": label, "prediction": prediction, "probabilities": probabilities})
        return lines

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names}


def label_names(train: LabelledTexts[str], validation: LabelledTexts[str]) -> list[str]:
    """The classes in a fixed order: numbers by size, else by alphabet.

    Raises UserError if there is only one, or validation has others.
    """
    counts = Counter(train.labels)
    names = sorted(counts, key=int) if all(_is_integer(name) for name in counts) else sorted(counts)
    problems = []
    if len(names) < 2:
        problems.append(f"all {len(train)} training texts have the label {names[0]!r}; classification needs two")
    unseen = sorted(set(validation.labels) - set(names))
    if unseen:
        listed = ", ".join(repr(name) for name in unseen[:_SHOWN_LABELS])
        problems.append(f"{len(unseen)} validation labels are not in the training file: {listed}")
    problems += mixed_kinds(train, validation)
    if problems:
        raise UserError(problems)
    return names


def classification_scores(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur in either, and Matthews correlation (0 where undefined)."""
    size = int(max(predicted.max(), labels.max())) + 1
    counts = np.zeros((size, size))
    np.add.at(counts, (labels, predicted), 1)
    correct, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = true + guessed > 0
    total = counts.sum()
    covariance = correct.sum() * total - true @ guessed
    spread = np.sqrt((total**2 - true @ true) * (total**2 - guessed @ guessed))
    return {
        "accuracy": float(correct.sum() / total),
        "macro_f1": float((2 * correct[occurs] / (true + guessed)[occurs]).mean()),
        "mcc": float(covariance / spread) if spread else 0.0,
    }


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
