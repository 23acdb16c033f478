"""Rows of tables as people have them: CSV, TSV, JSON Lines and JSON (all also gzipped), Parquet."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from metro_megatron.errors import UserError
from metro_megatron.text.parquet import column_names, read_rows, row_group_bytes
from metro_megatron.text.rows import (
    Example,
    Row,
    each_row,
    json_array_rows,
    json_line_rows,
    refuse_duplicates,
    text_file,
)

_DELIMITERS = (",", ";", "\t", "|")
_TOKEN_LINES = (".conll", ".bio", ".iob", ".iob2", ".txt")
"""Files of a token a line."""
_DOCUMENT_START = "-DOCSTART-"


@dataclass(frozen=True)
class Layout:
    """What stands where in a table."""

    text_columns: list[str] = field(default_factory=list)
    """Columns (keys, in JSON) of the text, or of both texts of a pair; for token that of the words, for span those of
    question and context, for multiple_choice that of the text, or those of a text and a question about it. Without it:
    text, or text_a and text_b; tokens; question and context; text."""
    label_columns: list[str] = field(default_factory=list)
    """Column of the label; for multi_label also one column of 0 and 1 for each label; for span the column of the
    answer, or those of the answer and of its first character. Without it: label; labels; tags; answers, or answer."""
    choice_columns: list[str] = field(default_factory=list)
    """Columns of the choices of multiple_choice, or the one that holds lists of them. Without it: choices."""
    delimiter: str = ""
    """What separates the fields of CSV and TSV; a tab may be written \\t. Without it comma, semicolon, tab or |, as
    the header has it."""
    unquoted: bool = False
    """CSV and TSV have no quoted fields: a quote is a character as any other."""

    @property
    def separator(self) -> str:
        """The delimiter; a shell hands \\t over as two characters."""
        return "\t" if self.delimiter == "\\t" else self.delimiter

    def problems(self) -> list[str]:
        """What is wrong with it."""
        if len(self.separator) > 1 or self.separator in ('"', "\n", "\r"):
            return [f"delimiter is {self.delimiter!r}, must be one character (a tab: \\t), and no quote or line end"]
        return []


PLAIN = Layout()
"""A table with the columns that a task asks for."""


def read_table(path: Path, layout: Layout = PLAIN) -> list[Row]:
    """All rows of a .csv, .tsv, .jsonl, .json or .parquet file, sentences of a .conll; .gz may follow (not .parquet).

    Raises UserError for a file that is missing, empty, damaged or of another form, and for a header or a JSON object
    that names a column twice.
    """
    ending = _ending(path)
    readers: dict[str, Callable[[TextIO, Path, Layout], Iterator[Row]]] = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _json_rows,
        ".json": _json_rows,
        **dict.fromkeys(_TOKEN_LINES, _sentences),
    }
    if ending not in readers and path.suffix.lower() != ".parquet":
        raise UserError(
            f"{path}: must be named .csv, .tsv, .jsonl, .json, for a token a line {', '.join(_TOKEN_LINES)} "
            "(.gz may follow these) or .parquet"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if ending not in readers:
        rows = list(_parquet_rows(path))
    else:
        with text_file(path) as file:
            rows = list(readers[ending](file, path, layout))
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def read_examples(
    path: Path,
    layouts: Sequence[Sequence[str]],
    read: Callable[[dict[str, Any], Sequence[str]], Example],
    layout: Layout = PLAIN,
) -> list[Example]:
    """What `read` makes of every row of a table.

    The first of `layouts` whose columns (or keys) the first row has is handed to `read` with each row. Raises UserError
    as `read_table` does, for a column that would be read twice, and for rows of which `read` raises it: the first of
    them are named by line.
    """
    rows = read_table(path, layout)
    columns = _columns(path, rows[0].values, layouts)
    refuse_duplicates(columns, f"{path}: what is read of it (--text_columns, --label_columns, --choice_columns)")
    return each_row(path, rows, lambda values: read(values, columns))


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _columns(path: Path, row: dict[str, Any], layouts: Sequence[Sequence[str]]) -> Sequence[str]:
    for columns in layouts:
        if all(column in row for column in columns):
            return columns
    found = ", ".join(row)
    needed = ", or ".join(
        f"{', '.join(columns[:-1])} and {columns[-1]}" if len(columns) > 1 else columns[0] for columns in layouts
    )
    raise UserError(
        f"{path}: has columns {found}; needs {needed}; --text_columns and --label_columns name others, --delimiter "
        "what separates them"
    )


def _csv_rows(file: TextIO, path: Path, layout: Layout) -> Iterator[Row]:
    header: list[str] = []
    for line, fields in _unquoted_fields(file, path, layout) if layout.unquoted else _fields(file, path, layout):
        if not header:
            header = [name.strip() for name in fields]
            refuse_duplicates([name for name in header if name], f"{path}: the header")
        elif len(fields) > len(header):
            raise UserError(
                f"{path}, line {line}: has {len(fields)} fields, the header {len(header)}; quote fields that hold a "
                "delimiter"
            )
        else:
            fields += [None] * (len(header) - len(fields))
            yield Row(f"line {line}", {name: value for name, value in zip(header, fields, strict=True) if name})


def _fields(file: TextIO, path: Path, layout: Layout) -> Iterator[tuple[int, list[Any]]]:
    """Line, of those of a row the first, and fields of every row that is not empty."""
    csv.field_size_limit(sys.maxsize)  # its own limit is 131,072 characters, less than long texts have
    reader = csv.reader(file, delimiter=layout.separator or _delimiter(file, path), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: not readable as CSV ({error}); if quotes are ordinary characters there, give "
                "--unquoted; else try JSONL"
            ) from error
        if fields:
            yield line, fields


def _unquoted_fields(file: TextIO, path: Path, layout: Layout) -> Iterator[tuple[int, list[Any]]]:
    delimiter = layout.separator or _delimiter(file, path)
    for number, line in enumerate(file, start=1):
        if line.strip("\r\n"):
            yield number, line.rstrip("\r\n").split(delimiter)


def _delimiter(file: TextIO, path: Path) -> str:
    """The one that the header has most; of those that it has equally often, the one that the file's name promises."""
    promised = "\t" if _ending(path) == ".tsv" else ","
    begin = file.tell()
    header = next((line for line in iter(file.readline, "") if line.strip()), "")
    file.seek(begin)
    plain = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=lambda one: (plain.count(one), one == promised))


def _json_rows(file: TextIO, path: Path, layout: Layout) -> Iterator[Row]:
    begin = file.tell()
    is_array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
    file.seek(begin)
    yield from (json_array_rows if is_array and _ending(path) == ".json" else json_line_rows)(file, path)


def _sentences(file: TextIO, path: Path, layout: Layout) -> Iterator[Row]:
    """Of lines of a token each, with its columns, and empty ones between sentences (CoNLL): lists by column, from "1".

    The first column is "tokens", too, and the last of several "tags". Left out are lines that begin with # and have
    another number of columns than most, which are comments, and those that begin a document.
    """
    lines = [(number, line.strip("\r\n")) for number, line in enumerate(file, start=1)]
    separator = layout.separator or ("\t" if any("\t" in line for _, line in lines) else "[ \t]+")
    fields = [(number, _token_fields(line, separator)) for number, line in lines]
    counts = Counter(len(one) for _, one in fields if one)
    most = counts.most_common(1)[0][0] if counts else 0
    sentence: list[list[str]] = []
    first = 1
    for number, one in [*fields, (len(fields) + 1, [])]:
        if one and (one[0] == _DOCUMENT_START or (len(one) != most and one[0].startswith("#"))):
            continue
        if len(one) not in (0, most):
            raise UserError(
                f"{path}, line {number}: has {len(one)} columns, most lines {most}; a line holds a token and its tag, "
                "an empty one ends a sentence"
            )
        if one and not sentence:
            first = number
        if one:
            sentence.append(one)
        elif sentence:
            columns = list(map(list, zip(*sentence, strict=True)))
            named = {"tokens": columns[0], **({"tags": columns[-1]} if most > 1 else {})}
            yield Row(f"line {first}", named | {str(i): column for i, column in enumerate(columns, start=1)})
            sentence = []


def _token_fields(line: str, separator: str) -> list[str]:
    """None for a line of white space alone."""
    return re.split(separator, line.strip(" ")) if line.strip(" \t") else []


def _parquet_rows(path: Path) -> Iterator[Row]:
    names = column_names(str(path))
    refuse_duplicates(names, f"{path}: the schema")
    groups = range(len(row_group_bytes(str(path))))
    for number, values in read_rows(str(path), groups, names):
        numbers = (float(value) if isinstance(value, Decimal) else value for value in values)
        yield Row(f"row {number + 1}", dict(zip(names, numbers, strict=True)))
