"""Every text, or pair of texts, has any number of labels, also none."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import (
    ID,
    LabelledTexts,
    class_label,
    is_printed_list,
    labelled_texts,
    mixed_kinds,
    read_labelled_texts,
    text_layouts,
    text_of,
    with_ids,
)
from metro_megatron.finetune.metrics import multi_label_scores
from metro_megatron.finetune.names import id2label, look_alikes, ordered_names, unseen_names
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts

Labels: TypeAlias = tuple[str, ...]

_SEPARATORS = (";", "|", ",")
_MARKS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class MultiLabel(Task[LabelledTexts[Labels]]):
    """Binary cross-entropy for each label; a text has those whose probability is above one half."""

    name = "multi_label"
    makes = "tagger of texts"
    head = "sequence_classification"
    own_scores = ("micro_f1", "macro_f1", "exact")
    usage = (
        'transformers.pipeline("text-classification", model="{output}", top_k=None, function_to_apply="sigmoid", '
        "trust_remote_code=True)"
    )

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> LabelledTexts[Labels]:
        """Labels are a list, names in one field with ; | or , between them, or columns of 0 and 1.

        Of these separators it is the first that any field of the file has.
        """
        if len(layout.label_columns) > 1 and is_labelled:
            return _read_marks(path, layout)
        one = layout if layout.label_columns else replace(layout, label_columns=["labels"])
        texts = read_labelled_texts(path, _label_field, one, is_labelled)
        fields = [field for field in texts.labels if isinstance(field, str)]
        separator = next((one for one in _SEPARATORS if any(one in field for field in fields)), None)
        return replace(texts, labels=[label_set(field, separator) for field in texts.labels])

    @cached_property
    def names(self) -> list[str]:
        """The labels in the order of the logits. Raises UserError for those that cannot be learned."""
        train, validation = ([name for labels in texts.labels for name in labels] for texts in self._texts)
        problems = mixed_kinds(*self._texts) + look_alikes([*train, *validation])
        names = ordered_names(train)
        if not names:
            problems.append("no training text has a label; multi_label needs some")
        problems += unseen_names(names, validation)
        always = [name for name, count in Counter(train).items() if count == len(self.train)]
        if always and len(always) == len(names):
            problems.append(f"all training texts have all labels ({', '.join(names)}); there is nothing to learn")
        if problems:
            raise UserError(problems)
        return names

    def settings(self) -> dict[str, Any]:
        return {**id2label(self.names), "problem_type": "multi_label_classification"}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: LabelledTexts[Labels]) -> Encoded:
        return encode_texts(tokenizer, examples, self._marks(examples).astype(float).tolist())

    def describe_labels(self) -> str:
        mean = sum(map(len, self.train.labels)) / len(self.train)
        return f"{len(self.names)} labels, {mean:.1f} a text"

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        return multi_label_scores(outputs[0] > 0, self._marks(self.validation))

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        lines = []
        for logits in torch.from_numpy(outputs[0]):
            has = [name for name, logit in zip(self.names, logits, strict=True) if logit > 0]
            lines.append(
                {"prediction": has, "probabilities": dict(zip(self.names, logits.sigmoid().tolist(), strict=True))}
            )
        return with_ids(lines, self.validation)

    def facts(self) -> dict[str, Any]:
        return {"labels": self.names, "majority_share": self._majority[1]}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        labels, share = self._majority
        shown = ", ".join(labels) if labels else "no label"
        found = [f"{shown} for every one of the validation {self.unit} would be exactly right in {share:.4f}"]
        if len(np.unique(outputs[0] > 0, axis=0)) == 1:
            found.append("the model gives all of them the same labels: it tells none apart")
        return found

    @property
    def _texts(self) -> tuple[LabelledTexts[Labels], LabelledTexts[Labels]]:
        return self.train, self.validation

    @property
    def _majority(self) -> tuple[Labels, float]:
        ((labels, count),) = Counter(tuple(sorted(one)) for one in self.validation.labels).most_common(1)
        return labels, count / len(self.validation)

    def _marks(self, texts: LabelledTexts[Labels]) -> np.ndarray:
        """Who has what, [texts, labels]."""
        return np.array([[name in labels for name in self.names] for labels in texts.labels])


def label_set(value: str | Labels, separator: str | None) -> Labels:
    """The labels of one text: a list of them as it is, or the names in one field."""
    names = [name.strip() for name in value.split(separator or "\n")] if isinstance(value, str) else value
    return tuple(dict.fromkeys(name for name in names if name))


def _label_field(value: Any) -> str | Labels:
    """One field as it stands in a file. Raises UserError."""
    if value is None:
        raise UserError("has no labels; write an empty list or field where a text has none")
    if isinstance(value, str):
        if is_printed_list(value):
            raise UserError(f"labels is {value!r}, a printed list; write names with ; between them, or JSONL")
        return value
    names = tuple(map(class_label, value if isinstance(value, list | tuple) else [value]))
    if len(set(names)) < len(names):
        raise UserError(
            f"labels is {list(value)}, which has a name twice; write every name once, and 0 and 1 for each label in "
            "columns (--label_columns)"
        )
    return names


def _read_marks(path: Path, layout: Layout) -> LabelledTexts[Labels]:
    labels = layout.label_columns

    def read(row: dict[str, Any], columns: Sequence[str]) -> tuple[list[str], Labels, Any]:
        texts = [text_of(row, name) for name in columns if name not in labels]
        return texts, tuple(name for name in labels if _mark(row, name)), row.get(ID)

    layouts = [(*texts, *labels) for texts in text_layouts(layout)]
    return labelled_texts(read_examples(path, layouts, read, layout), True)


def _mark(row: dict[str, Any], name: str) -> bool:
    value = str(row.get(name)).strip().lower()
    if value not in _MARKS:
        raise UserError(f"{name} is {row.get(name)!r}, must be 0 or 1 where labels have columns of their own")
    return _MARKS[value]
