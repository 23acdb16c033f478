"""Labelled examples from CSV, TSV and JSONL files."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from metro_megatron.errors import UserError

Example = TypeVar("Example")
Label = TypeVar("Label")

_TEXTS = (("text", "label"), ("text_a", "text_b", "label"))
_SHOWN_PROBLEMS = 5


def read_examples(
    path: Path, layouts: Sequence[Sequence[str]], read: Callable[[dict[str, Any], Sequence[str]], Example]
) -> list[Example]:
    """What `read` makes of every row of a .csv, .tsv, .jsonl or .json file.

    The first of `layouts` whose columns (or keys) the first row has is handed to `read` with each row. Raises UserError
    for a file that is missing, empty or of another form, and for rows of which `read` raises it: the first of them are
    named by line.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: must be named .csv, .tsv, .jsonl or .json")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it, for instance with iconv") from error
    if not rows:
        raise UserError(f"{path}: holds no rows")
    columns = _columns(path, rows[0][1], layouts)
    problems, examples = [], []
    for line, row in rows:
        try:
            examples.append(read(row, columns))
        except UserError as error:
            problems.append(f"{path}, line {line}: {error}")
    if problems:
        more = [f"{path}: {len(problems)} such rows of {len(rows)}"] if len(problems) > _SHOWN_PROBLEMS else []
        raise UserError(problems[:_SHOWN_PROBLEMS] + more)
    return examples


@dataclass(frozen=True)
class LabelledTexts(Generic[Label]):
    """Rows of one file: texts, their pairs (None for single texts) and labels."""

    first: list[str]
    second: list[str] | None
    labels: list[Label]

    def __len__(self) -> int:
        return len(self.labels)


def class_label(value: Any) -> str:
    """A label as it stands in a file, as the name of a class. Raises UserError."""
    if isinstance(value, float):
        raise UserError(f"label {value!r} is not a class; write classes as strings or integers")
    if not isinstance(value, (str, int)) or value == "":
        raise UserError("has no label")
    return str(value)


def read_labelled_texts(path: Path, read_label: Callable[[Any], Any] = class_label) -> LabelledTexts[Any]:
    """Read text and label, or text_a, text_b and label; labels are what read_label makes of them.

    Raises UserError as `read_examples` does, for rows without text, and where read_label raises it.
    """

    def read(row: dict[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
        *names, label = columns
        for name in names:
            if not isinstance(row.get(name), str):
                raise UserError(f"{name} is {row.get(name)!r}, must be a string" if name in row else f"has no {name}")
        return *(row[name] for name in names), read_label(row.get(label))

    *texts, labels = map(list, zip(*read_examples(path, _TEXTS, read), strict=True))
    return LabelledTexts(texts[0], texts[1] if len(texts) > 1 else None, labels)


def mixed_kinds(train: LabelledTexts[Any], validation: LabelledTexts[Any]) -> list[str]:
    """The problem, if there is one, of single texts in one file and pairs in the other."""
    if (train.second is None) == (validation.second is None):
        return []
    return ["one file has single texts (text), the other pairs (text_a, text_b); give two of a kind"]


def _columns(path: Path, row: dict[str, Any], layouts: Sequence[Sequence[str]]) -> Sequence[str]:
    for columns in layouts:
        if all(column in row for column in columns):
            return columns
    found = ", ".join(str(name) for name in row)
    needed = ", or ".join(f"{', '.join(columns[:-1])} and {columns[-1]}" for columns in layouts)
    raise UserError(f"{path}: has columns {found}; needs {needed}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise UserError(f"{path}, line {reader.line_num}: has more fields than the header; quote commas")
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not readable as CSV ({error}); try JSONL") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not one JSON object a line ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: is a {type(row).__name__}, must be an object")
            yield number, row
