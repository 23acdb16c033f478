"""Rows of text files as people have them: UTF-8 with or without a mark, gzipped or not, objects of JSON Lines."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from metro_megatron.errors import UserError

Example = TypeVar("Example")
_SHOWN_PROBLEMS = 5


class Row(NamedTuple):
    """A row of a file, and where it begins: `line 3`; `row 3` in Parquet and in a JSON array."""

    where: str
    values: dict[str, Any]

    @property
    def number(self) -> int:
        """Of the line or row, from 1."""
        return int(self.where.rpartition(" ")[2])


def each_row(path: Path, rows: Sequence[Row], read: Callable[[dict[str, Any]], Example]) -> list[Example]:
    """What `read` makes of every row. Raises UserError that names the first rows for which `read` does."""
    problems, examples = [], []
    for row in rows:
        try:
            examples.append(read(row.values))
        except UserError as error:
            problems += [f"{path}, {row.where}: {problem}" for problem in error.problems]
    if problems:
        more = [f"{path}: {len(problems)} such rows of {len(rows)}"] if len(problems) > _SHOWN_PROBLEMS else []
        raise UserError(problems[:_SHOWN_PROBLEMS] + more)
    return examples


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file in UTF-8, with or without a byte order mark, gzipped or not; line ends as they are.

    Raises UserError where, in the block, it turns out to be something else.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        where = _place_of_wrong_byte(path)
        raise UserError(f"{path}, {where}; convert it, for instance with iconv") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable as gzip ({error}); fetch or compress the file again") from error


def json_line_rows(file: TextIO, path: Path) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; empty lines are none. Raises UserError, by line."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(f"line {number}", _object(_parsed(line, where, "one JSON object a line"), where, line))


def json_array_rows(file: TextIO, path: Path) -> Iterator[Row]:
    """Rows of a file that is one JSON array of objects. Raises UserError, by row."""
    text = file.read()
    for number, item in enumerate(_parsed(text, str(path), "a JSON array"), start=1):
        yield Row(f"row {number}", _object(item, f"{path}, row {number}", text))


def refuse_duplicates(names: Sequence[str], what: str) -> None:
    """Raise UserError if a name is there twice."""
    twice = [f"{name!r} {count} times" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{what} has {', '.join(twice)}; rename or remove all but one")


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not {what} ({error})") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json would let the last of equal keys win."""
    refuse_duplicates([name for name, _ in pairs], "an object")
    return dict(pairs)


def _object(value: Any, where: str, text: str) -> dict[str, Any]:
    """`text` is what it was read from. Halves of surrogate pairs, which only escapes can spell, break tokenizers."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is a {type(value).__name__}, must be an object")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{where}: holds half of a surrogate pair ({half}); replace or remove it") from error
    return value


def _place_of_wrong_byte(path: Path) -> str:
    """Line and byte, both from the file's begin: the error of a stream counts within what was read at once."""
    start = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: not UTF-8 at byte {start + error.start}"
            start += len(line)
    raise AssertionError("all of it is UTF-8")
