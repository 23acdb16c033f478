"""What a task adds to fine-tuning. Each is one file in metro_megatron/finetune/tasks/; run.py is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.models import Head

Row: TypeAlias = dict[str, Any]
"""One input of the model. Keys that are no parameters of its forward are the task's own and kept from it."""
Outputs: TypeAlias = tuple[NDArray[np.float32], ...]
"""What the model returns but for its loss, for all validation rows in order; -100 fills up rows of unequal length."""
Examples = TypeVar("Examples", bound=Sized)


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
    score_names: ClassVar[tuple[str, ...]]
    """Keys of `scores` in the order in which they are shown; the first is the one that models are compared by."""
    usage: ClassVar[str]
    """How to run the result, a folder {output}, with transformers."""

    train: Examples
    validation: Examples

    @classmethod
    def read(cls, train: Path, validation: Path) -> Self:
        """The task with the examples of two files. Raises UserError with the problems of both."""
        found, problems = [], []
        for path in (train, validation):
            try:
                found.append(cls.read_examples(path))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return cls(*found)

    @staticmethod
    @abstractmethod
    def read_examples(path: Path) -> Examples:
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


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: LabelledTexts[Any], labels: Sequence[float]) -> Encoded:
    """A row for every text or pair, cut at the tokenizer's length.

    Text that spells a special token stays text, as in pretraining.
    """
    encoded = tokenizer(
        texts.first, texts.second, truncation=True, split_special_tokens=True, return_attention_mask=False
    )
    num_cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    columns = zip(*encoded.values(), labels, strict=True)  # ids, and for BERT token_type_ids
    return Encoded([dict(zip((*encoded, "label"), row, strict=True)) for row in columns], num_cut)
