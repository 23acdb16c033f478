"""What tasks learn from, and how it is read from tables: texts with labels, tagged words, choices, questions."""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from metro_megatron.errors import UserError
from metro_megatron.finetune.tables import PLAIN, Layout, read_examples

Label = TypeVar("Label")

_NO_LABEL = -100
ID = "id"
"""Column whose values are handed through to the predictions."""


@dataclass(frozen=True)
class LabelledTexts(Generic[Label]):
    """Texts of one file, their pairs (None for single texts) and labels (none at all in a file to be predicted)."""

    first: list[str]
    second: list[str] | None
    labels: list[Label]
    ids: list[Any] = field(default_factory=list)
    """What names each text outside, where the file says it."""
    groups: list[Any] = field(default_factory=list)
    """Equal for rows that are scored together, in the tasks that have such."""

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """What each row gives to read."""
        return zip(self.first, self.second, strict=True) if self.second else ((text,) for text in self.first)

    def __contains__(self, texts: object) -> bool:
        return any(texts == own for own in self)


def class_label(value: Any) -> str:
    """A label as it stands in a file, as the name of a class. Raises UserError."""
    if isinstance(value, float) and not value.is_integer():
        raise UserError(f"label {value!r} is not a class; write classes as strings or integers")
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError("has no label")
    if value in (_NO_LABEL, str(_NO_LABEL)):
        raise UserError(f"label is {value}, which transformers takes for none; leave the row out, or give a class")
    return str(int(value) if isinstance(value, float) else value)


def class_among(value: Any, names: Sequence[str]) -> str:
    """A label of a benchmark, whose names are known. Raises UserError for others."""
    if value not in names:
        raise UserError(f"label is {value!r}, must be one of {', '.join(names)}; fetch the file again")
    return str(value)


def read_labelled_texts(
    path: Path,
    read_label: Callable[[Any], Any] = class_label,
    layout: Layout = PLAIN,
    is_labelled: bool = True,
) -> LabelledTexts[Any]:
    """Read text and label, or text_a, text_b and label, or the columns of `layout`; labels are what read_label makes.

    Raises UserError as `read_examples` does, for rows without text, and where read_label raises it.
    """
    label = one_column(layout.label_columns, "label_columns", "label") if is_labelled else None

    def read(row: dict[str, Any], columns: Sequence[str]) -> tuple[list[str], Any, Any]:
        texts = [text_of(row, name) for name in columns if name != label]
        return texts, None if label is None else read_label(row.get(label)), row.get(ID)

    layouts = [(*texts, *([label] if label else [])) for texts in text_layouts(layout)]
    return labelled_texts(read_examples(path, layouts, read, layout), is_labelled)


def labelled_texts(rows: Sequence[tuple[list[str], Any, Any]], is_labelled: bool) -> LabelledTexts[Any]:
    """Of one or two texts, label and id of every row; ids are kept if every row has one."""
    texts, labels, ids = zip(*rows, strict=True)
    first, *second = map(list, zip(*texts, strict=True))
    return LabelledTexts(
        first, second[0] if second else None, list(labels) if is_labelled else [], [] if None in ids else list(ids)
    )


def with_ids(lines: Sequence[dict[str, Any]], texts: LabelledTexts[Any]) -> list[dict[str, Any]]:
    """Lines of predictions, one for every text, behind its id and its label where there are such."""
    columns = {name: values for name, values in ((ID, texts.ids), ("label", texts.labels)) if values}
    return [{**{name: values[i] for name, values in columns.items()}, **line} for i, line in enumerate(lines)]


def text_layouts(layout: Layout) -> list[tuple[str, ...]]:
    """The columns that may hold a text or a pair. Raises UserError."""
    if len(layout.text_columns) > 2:
        raise UserError(f"text_columns is {' '.join(layout.text_columns)}; give one column, or two for pairs")
    return [tuple(layout.text_columns)] if layout.text_columns else [("text",), ("text_a", "text_b")]


def one_column(given: Sequence[str], option: str, default: str) -> str:
    """The column that an option names. Raises UserError if it names several."""
    if len(given) > 1:
        raise UserError(f"{option} is {' '.join(given)}; this task takes one column")
    return given[0] if given else default


def is_printed_list(text: str) -> bool:
    """Whether a field is a list, tuple, set or NumPy array as Python prints it: so tables of lists become CSV.

    "[ a ]" and "[sic]" are words.
    """
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return False
    for written in (text, re.sub(r"\s+", ", ", text)):  # NumPy writes no commas
        try:
            return isinstance(ast.literal_eval(written), list | tuple | set)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return False


def text_of(row: dict[str, Any], name: str) -> str:
    """The string in a column. Raises UserError."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{name} is {row[name]!r}, must be a string" if name in row else f"has no {name}")
    return row[name]


def mixed_kinds(train: LabelledTexts[Any], validation: LabelledTexts[Any]) -> list[str]:
    """The problem, if there is one, of single texts in one file and pairs in the other."""
    if (train.second is None) == (validation.second is None):
        return []
    return ["one file has single texts (text), the other pairs (text_a, text_b); give two of a kind"]
