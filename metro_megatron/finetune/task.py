"""What a task adds to fine-tuning. Each is one file in metro_megatron/finetune/tasks/; run.py is the same for all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.models import Head
from metro_megatron.finetune.tables import PLAIN, Layout

Row: TypeAlias = dict[str, Any]
"""One input of the model. Keys that are no parameters of its forward are the task's own and kept from it."""
Outputs: TypeAlias = tuple[NDArray[np.float32], ...]
"""What the model returns but for its loss, for all validation rows in order; -100 fills up rows of unequal length."""
_PART = 1000
Examples = TypeVar("Examples", bound=Collection[Hashable])


@dataclass(frozen=True)
class Encoded:
    """The rows of one file: one for every example, or several (windows of a long text), and how many were cut."""

    rows: list[Row]
    num_cut: int


@dataclass(frozen=True)
class Task(ABC, Generic[Examples]):
    """A task and its examples. Methods stand in the order in which they are asked."""

    name: ClassVar[str]
    """How the command line and metrics.json call it."""
    unit: ClassVar[str] = "texts"
    """What an example is, in the plural."""
    makes: ClassVar[str]
    """What the trained model is, for the reader."""
    head: ClassVar[Head]
    """What stands on the encoder; it starts fresh."""
    cut: ClassVar[str] = "cut to {length} tokens"
    """What happens to examples that are too long for a row of {length}."""
    longest_row: ClassVar[float] = math.inf
    """Tokens that a row has at most where nobody asks for more."""
    own_scores: ClassVar[tuple[str, ...]]
    """The `score_names` of examples that are of no benchmark."""
    has_validation_loss: ClassVar[bool] = True
    """Whether the model's loss of validation rows says anything."""
    usage: ClassVar[str]
    """How to run the result, a folder {output}, with transformers."""

    train: Examples
    validation: Examples
    others: Mapping[str, Task[Any]] = field(default_factory=dict)
    """What else the trained model is asked, by name: tasks with the same train whose validation is another set; what
    has no labels is predicted, else scored too."""
    benchmark: str = ""
    """The benchmark's task whose examples these are, as the command line calls it; none for a user's own."""
    published_scores: tuple[str, ...] = ()
    """The `score_names` of that task."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """Keys of `scores` in the order in which they are shown; the first is the one that models are compared by."""
        return self.published_scores or self.own_scores

    @classmethod
    def read(cls, train: Path, validation: Path, predict: Path | None = None, layout: Layout = PLAIN) -> Self:
        """The task with the examples of two files, and with those of a third that has no labels as others["predict"].

        Raises UserError with the problems of all, and if validation has nothing that train has not.
        """
        problems = layout.problems()
        if problems:
            raise UserError(problems)
        found: list[Examples] = []
        for path, is_labelled in ((train, True), (validation, True), *([(predict, False)] if predict else [])):
            try:
                found.append(cls.read_examples(path, layout, is_labelled))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        known = set(found[0])
        seen = sum(example in known for example in found[1])
        if seen == len(found[1]):
            raise UserError(
                f"{validation}: all {seen} {cls.unit} are in {train} too; give {cls.unit} that are not learned from"
            )
        if seen and is_first_process():
            print(f"{validation}: {seen} of {len(found[1])} {cls.unit} are in {train} too", flush=True)
        others = {"predict": cls(found[0], found[2])} if predict else {}
        return cls(found[0], found[1], others)

    @staticmethod
    @abstractmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> Examples:
        """The examples of one file. Raises UserError, for rows by file and line."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it sets in the model's configuration. Raises UserError for labels that cannot be learned."""

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: Examples) -> Encoded:
        """The rows of `train` or `validation`."""

    @abstractmethod
    def describe_labels(self) -> str:
        """A word on the labels, for the line that says what was read."""

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
        """Makes a batch of rows, as keywords of the model's forward; this one pads input_ids and stacks the rest."""
        return DataCollatorWithPadding(tokenizer)

    @abstractmethod
    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        """How good the outputs for the validation rows are, by score_names."""

    @abstractmethod
    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """A line of predictions.jsonl for every validation example, made of the outputs for the validation rows."""

    def facts(self) -> dict[str, Any]:
        """What metrics.json says about the labels."""
        return {}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        """What a reader of the scores must know, a sentence each."""
        return []


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: LabelledTexts[Any], labels: Sequence[Any]) -> Encoded:
    """A row for every text or pair, cut at the tokenizer's length, with its label if there are any.

    Text that spells a special token stays text, as in pretraining.
    """
    rows, num_cut = [], 0
    for part in parts(len(texts)):
        second = texts.second and texts.second[part]
        encoded = tokenizer(
            texts.first[part], second, truncation=True, split_special_tokens=True, return_attention_mask=False
        )
        num_cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        # Ids, for BERT token_type_ids, and labels.
        columns = {**encoded, **({"label": labels[part]} if labels else {})}
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Encoded(rows, num_cut)


def parts(length: int) -> Iterator[slice]:
    """What to tokenize at once: what tokenizers give back has much more than ids."""
    return (slice(begin, begin + _PART) for begin in range(0, length, _PART))
