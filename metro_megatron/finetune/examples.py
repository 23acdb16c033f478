"""Labelled texts from CSV, TSV and JSONL files."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError

_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of one file: texts, their pairs (None for single texts) and labels as they are written."""

    first: list[str]
    second: list[str] | None
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def read_labelled_texts(path: Path) -> LabelledTexts:
    """Read columns (or keys) text and label, or text_a, text_b and label, of a .csv, .tsv, .jsonl or .json file.

    Labels are strings or integers. Raises UserError for a file that is missing, empty, of another form, or has rows
    without text or label; the first of them are named by line.
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
    columns = _columns(path, rows[0][1])
    problems, texts = [], []
    for line, row in rows:
        problem = _row_problem(row, columns)
        if problem:
            problems.append(f"{path}, line {line}: {problem}")
        else:
            texts.append([row[column] for column in columns])
    if problems:
        more = [f"{path}: {len(problems)} such rows of {len(rows)}"] if len(problems) > _SHOWN_PROBLEMS else []
        raise UserError(problems[:_SHOWN_PROBLEMS] + more)
    *parts, labels = zip(*texts, strict=True)
    return LabelledTexts(list(parts[0]), list(parts[1]) if len(parts) > 1 else None, [str(one) for one in labels])


def label_names(train: LabelledTexts, validation: LabelledTexts) -> list[str]:
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
        listed = ", ".join(repr(name) for name in unseen[:_SHOWN_PROBLEMS])
        problems.append(f"{len(unseen)} validation labels are not in the training file: {listed}")
    if (train.second is None) != (validation.second is None):
        problems.append("one file has single texts (text), the other pairs (text_a, text_b); give two of a kind")
    if problems:
        raise UserError(problems)
    return names


def _columns(path: Path, row: dict[str, Any]) -> list[str]:
    for columns in (["text", "label"], ["text_a", "text_b", "label"]):
        if all(column in row for column in columns):
            return columns
    found = ", ".join(str(name) for name in row)
    raise UserError(f"{path}: has columns {found}; needs text and label, or text_a, text_b and label")


def _row_problem(row: dict[str, Any], columns: list[str]) -> str | None:
    *texts, label = columns
    for name in texts:
        if not isinstance(row.get(name), str):
            return f"{name} is {row.get(name)!r}, must be a string" if name in row else f"has no {name}"
    value = row.get(label)
    if isinstance(value, float):
        return f"label {value!r} is not a class; write classes as strings or integers"
    if not isinstance(value, (str, int)) or value == "":
        return "has no label"
    return None


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


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
