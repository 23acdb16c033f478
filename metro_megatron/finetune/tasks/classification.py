"""Every text, or pair of texts, belongs to one class."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, mixed_kinds, read_labelled_texts, with_ids
from metro_megatron.finetune.metrics import classification_scores
from metro_megatron.finetune.names import finite_number, id2label, look_alikes, ordered_names, unseen_names
from metro_megatron.finetune.tables import PLAIN, Layout
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts

_MANY_CLASSES = 50


class Classification(Task[LabelledTexts[str]]):
    """Cross-entropy over the classes of the training file."""

    name = "classification"
    makes = "classifier"
    head = "sequence_classification"
    own_scores: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    usage = 'transformers.pipeline("text-classification", model="{output}", trust_remote_code=True)'

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> LabelledTexts[str]:
        """Labels are strings or integers, kept as they are written."""
        return read_labelled_texts(path, layout=layout, is_labelled=is_labelled)

    @cached_property
    def names(self) -> list[str]:
        """The classes in the order of the logits."""
        return label_names(self.train, self.validation)

    def settings(self) -> dict[str, Any]:
        return {**id2label(self.names), "problem_type": "single_label_classification"}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: LabelledTexts[str]) -> Encoded:
        number = {name: i for i, name in enumerate(self.names)}
        return encode_texts(tokenizer, examples, [number[label] for label in examples.labels])

    def describe_labels(self) -> str:
        return f"{len(self.names)} classes"

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        return classification_scores(outputs[0].argmax(-1), np.array([row["label"] for row in rows]))

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        chances = torch.from_numpy(outputs[0]).softmax(-1).tolist()
        lines = [
            {"prediction": self.names[number], "probabilities": dict(zip(self.names, row, strict=True))}
            for number, row in zip(outputs[0].argmax(-1), chances, strict=True)
        ]
        return with_ids(lines, self.validation)

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names, "majority_share": self._majority[1]}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        name, share = self._majority
        found = [f"{name!r} for every one of the validation {self.unit} would have an accuracy of {share:.4f}"]
        predicted = set(outputs[0].argmax(-1).tolist())
        if len(predicted) == 1:
            found.append(f"the model gives all of them the class {self.names[predicted.pop()]!r}: it tells none apart")
        return found

    @property
    def _majority(self) -> tuple[str, float]:
        """The most frequent class of validation, and its share there."""
        ((name, count),) = Counter(self.validation.labels).most_common(1)
        return name, count / len(self.validation)


def label_names(train: LabelledTexts[str], validation: LabelledTexts[str]) -> list[str]:
    """The classes in a fixed order: numbers by size, else by alphabet.

    Raises UserError if there is only one, if validation has others, and for what is no column of classes.
    """
    names = ordered_names(train.labels)
    problems = []
    if len(names) < 2:
        problems.append(f"all {len(train)} training texts have the label {names[0]!r}; classification needs two")
    score = _a_score(names)
    if score:
        problems.append(
            f"the training labels are {len(names)} different numbers such as {score}: scores, which --task regression "
            "learns; write classes as words or integers"
        )
    elif len(names) > max(_MANY_CLASSES, len(train) / 2):
        problems.append(
            f"{len(train)} training texts have {len(names)} different labels, too many to be classes; is it the right "
            "column (--label_columns)? --task regression learns numbers"
        )
    else:
        problems += look_alikes([*train.labels, *validation.labels])
        problems += unseen_names(names, validation.labels)
    problems += mixed_kinds(train, validation)
    if problems:
        raise UserError(problems)
    return names


def _a_score(names: Sequence[str]) -> str | None:
    """One with a fraction, behind a point or a comma, if all are numbers."""
    numbers = {name: finite_number(name.replace(",", ".")) for name in names}
    if None in numbers.values():
        return None
    return next((name for name, number in numbers.items() if number and not number.is_integer()), None)
