"""One of the choices that a text is given with is the right one."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import ID, LabelledTexts, one_column, text_of
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task, encode_texts, parts

_LETTERS = "ABCDEFGHIJ"
_ARRAYS = {"input_ids": np.int32, "token_type_ids": np.int8}


@dataclass(frozen=True)
class Choice:
    """A text and what may go with it; label is the number of the right one, None in a file to be predicted."""

    text: str
    choices: tuple[str, ...]
    label: int | None
    id: Any = field(default=None, compare=False)

    @property
    def is_labelled(self) -> bool:
        return self.label is not None


class MultipleChoice(Task[list[Choice]]):
    """Every choice, as the second of a pair, gets a score; cross-entropy over the scores of one text."""

    name = "multiple_choice"
    makes = "chooser"
    head = "multiple_choice"
    own_scores: ClassVar[tuple[str, ...]] = ("accuracy",)
    usage = 'transformers.AutoModelForMultipleChoice.from_pretrained("{output}", trust_remote_code=True)'

    @staticmethod
    def read_examples(path: Path, layout: Layout = PLAIN, is_labelled: bool = True) -> list[Choice]:
        """Choices have a column each, or stand in a list; a question about the text is read before each of them.

        Of columns the last may be empty, where there are fewer choices. Labels count from 0, or are letters from A.
        """
        texts, label = layout.text_columns or ["text"], one_column(layout.label_columns, "label_columns", "label")
        columns = layout.choice_columns or ["choices"]
        if len(texts) > 2:
            raise UserError(f"text_columns is {' '.join(texts)}; give the column of the text, then that of a question")

        def read(row: dict[str, Any], _: Sequence[str]) -> Choice:
            text, *question = [text_of(row, name) for name in texts]
            found = row.get(columns[0]) if len(columns) == 1 else choices_of(row, columns)
            if not isinstance(found, list) or len(found) < 2 or not all(isinstance(one, str) for one in found):
                raise UserError(f"{columns[0]} is {found!r}, must be a list of two strings or more")
            number = choice_label(row.get(label), len(found)) if is_labelled else None
            return Choice(text, tuple(" ".join([*question, one]) for one in found), number, row.get(ID))

        return read_examples(path, [(*texts, *columns, *([label] if is_labelled else []))], read, layout)

    def settings(self) -> dict[str, Any]:
        return {"num_labels": 1}

    def encode(self, tokenizer: PreTrainedTokenizerFast, examples: list[Choice]) -> Encoded:
        rows = encode_choices(tokenizer, examples)
        for row, one in zip(rows.rows, examples, strict=True):
            row |= {} if one.label is None else {"label": one.label}
        return rows

    def describe_labels(self) -> str:
        sizes = sorted({len(one.choices) for one in self.train})
        return f"{sizes[0]} choices each" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} choices"

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
        return ChoiceCollator(tokenizer)

    def scores(self, outputs: Outputs, rows: Sequence[Row]) -> dict[str, float]:
        taken = [scores.argmax() for scores in self._scores(outputs)]
        return {"accuracy": float(np.mean(np.array(taken) == [row["label"] for row in rows]))}

    def predictions(self, outputs: Outputs, rows: Sequence[Row]) -> list[dict[str, Any]]:
        lines = []
        for one, scores in zip(self.validation, self._scores(outputs), strict=True):
            line: dict[str, Any] = {} if one.id is None else {ID: one.id}
            line |= {} if one.label is None else {"label": one.label}
            chances = torch.from_numpy(scores).softmax(-1).tolist()
            lines.append({**line, "prediction": int(scores.argmax()), "probabilities": chances})
        return lines

    def facts(self) -> dict[str, Any]:
        return {"majority_share": self._majority[1]}

    def remarks(self, outputs: Outputs, rows: Sequence[Row]) -> list[str]:
        number, share = self._majority
        found = [f"choice {number} for every one of the validation {self.unit} would have an accuracy of {share:.4f}"]
        predicted = {int(scores.argmax()) for scores in self._scores(outputs)}
        if len(predicted) == 1:
            found.append(f"the model takes choice {predicted.pop()} for all of them: it tells none apart")
        return found

    def _scores(self, outputs: Outputs) -> list[NDArray[np.floating]]:
        """Of every text's own choices."""
        return [scores[: len(one.choices)] for one, scores in zip(self.validation, outputs[0], strict=True)]

    @property
    def _majority(self) -> tuple[int, float]:
        ((number, count),) = Counter(one.label for one in self.validation if one.label is not None).most_common(1)
        return number, count / len(self.validation)


@dataclass(frozen=True)
class ChoiceCollator:
    """Pads all choices of a batch to one length: every input of the model is [B, choices, S].

    Texts with fewer choices than others have some of padding alone, which `ignore_missing_choices` is about.
    """

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name != "label"]
        most = max(len(row[names[0]]) for row in rows)
        flat = [
            {name: row[name][i].tolist() if i < len(row[name]) else [] for name in names}
            for row in rows
            for i in range(most)
        ]
        padded = self.tokenizer.pad(flat, return_tensors="pt")
        batch = {name: values.view(len(rows), -1, values.shape[-1]) for name, values in padded.items()}
        return batch | ({"labels": torch.tensor([row["label"] for row in rows])} if "label" in rows[0] else {})


def encode_choices(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Choice]) -> Encoded:
    """A row for every text, whose inputs are arrays for each of its choices: ReCoRD has a million pairs."""
    rows, num_cut = [], 0
    for part in parts(len(examples)):
        flat = [(one.text, choice) for one in examples[part] for choice in one.choices]
        texts: LabelledTexts[Any] = LabelledTexts([text for text, _ in flat], [choice for _, choice in flat], [])
        encoded = encode_texts(tokenizer, texts, [])
        choices = iter(encoded.rows)
        for one in examples[part]:
            own = [next(choices) for _ in one.choices]
            rows.append({name: [np.array(row[name], dtype=_ARRAYS[name]) for row in own] for name in own[0]})
        num_cut += encoded.num_cut
    return Encoded(rows, num_cut)


def choices_of(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Those that have a column each, up to the first that is empty. Raises UserError for one behind that."""
    given = [name for name in columns if row.get(name) not in ("", None)]
    if given != list(columns[: len(given)]):
        empty = next(name for name in columns if name not in given)
        raise UserError(f"{empty} is empty, {given[-1]} is not; give the choices in the first columns")
    return [text_of(row, name) for name in given]


def choice_label(value: Any, size: int) -> int:
    """The number of the right choice as it stands in a file: from 0, or a letter from A. Raises UserError."""
    text = str(value).strip().upper()
    number = _LETTERS.find(text) if len(text) == 1 and text in _LETTERS else -1
    if text.removesuffix(".0").isdecimal():
        number = int(text.removesuffix(".0"))
    if not 0 <= number < size:
        raise UserError(f"label {value!r} is none of {size} choices; they count from 0 (or from A)")
    return number
