"""Reading documents from files: JSON Lines, or plain text with blank lines between documents.

Two steps, so that they can run in different processes: `read_records` cuts a file into raw records in bounded
memory, `parse_record` makes a document (its non-empty lines, the units) of one, or says why not.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedReader
from itertools import chain
from pathlib import Path

import orjson

from metro_megatron.data.sources import BUFFER_BYTES, COMPRESSIONS, Source, decompressed
from metro_megatron.errors import UserError

MAX_DOCUMENT_BYTES = 10_000_000
"""Default limit of a record. The longest books are about half as long; encoding so much takes below 1 GB."""

_JSON_LINES, _PLAIN_TEXT = (".jsonl", ".json", ".ndjson"), (".txt",)
_BOM = b"\xef\xbb\xbf"


class Reject(StrEnum):
    """Why a record gives no document."""

    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_KEY = "missing_key"
    NOT_A_STRING = "not_a_string"
    NOT_UTF8 = "not_utf8"
    EMPTY = "empty"
    TOO_LONG = "too_long"


@dataclass(frozen=True)
class Record:
    """One line of JSON Lines, or the lines between two blank ones; None where it was too long to keep."""

    line: int
    """Number of its first line in the file, from 1."""
    raw: bytes | None


def check_inputs(paths: Sequence[str]) -> None:
    """Raise UserError naming every path that is missing, no file, unreadable or of an unknown kind."""
    problems = [] if paths else ["no input files given"]
    for path in paths:
        if not Path(path).exists():
            problems.append(f"{path}: no such file")
        elif Path(path).is_dir():
            problems.append(f"{path}: is a folder; name its files, for example {path.rstrip('/')}/*.jsonl")
        elif _kind(path)[0] not in _JSON_LINES + _PLAIN_TEXT:
            known = ", ".join(_JSON_LINES + _PLAIN_TEXT)
            problems.append(
                f"{path}: unknown kind of file; names end in {known}, then optionally .gz or .zst"
            )
        else:
            try:
                Source(path).close()
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)


def read_documents(
    paths: Sequence[str],
    rejects: Counter[Reject],
    text_key: str = "text",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    on_progress: Callable[[int], object] = lambda position: None,
) -> Iterator[list[str]]:
    """The documents of all files in order, each as its non-empty lines; rejects are counted into `rejects`.

    `on_progress` is called with the bytes read so far over all files.
    """
    finished = 0
    for path in paths:
        source = Source(path)
        for record in read_records(source, max_document_bytes):
            document = parse_record(record.raw, is_json_lines(path), text_key)
            if isinstance(document, Reject):
                rejects[document] += 1
            else:
                on_progress(finished + source.position)
                yield document
        finished += source.finish()[0]


def is_json_lines(path: str) -> bool:
    """Whether records of this file are JSON; they are plain text otherwise."""
    return _kind(path)[0] in _JSON_LINES


def read_records(source: Source, max_document_bytes: int) -> Iterator[Record]:
    """Cut a file into records without ever holding more than `max_document_bytes` of one.

    Raises UserError if the file cannot be read, or compressed data is damaged or cut off.
    """
    ending, compression = _kind(source.path)
    cut = _json_records if ending in _JSON_LINES else _text_records
    with decompressed(source, compression) as stream:
        yield from cut(stream, max_document_bytes)


def parse_record(raw: bytes | None, is_json: bool, text_key: str) -> list[str] | Reject:
    """The document of a record: its non-empty lines without surrounding white space. Never raises."""
    if raw is None:
        return Reject.TOO_LONG
    try:
        text = orjson.loads(raw) if is_json else raw.decode()
    except UnicodeDecodeError:
        return Reject.NOT_UTF8
    except orjson.JSONDecodeError:
        return Reject.INVALID_JSON if _is_utf8(raw) else Reject.NOT_UTF8
    if is_json:
        if not isinstance(text, dict):
            return Reject.NOT_AN_OBJECT
        if text_key not in text:
            return Reject.MISSING_KEY
        text = text[text_key]
        if not isinstance(text, str):
            return Reject.NOT_A_STRING
    units = [line for line in map(str.strip, text.split("\n")) if line]
    return units or Reject.EMPTY


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _kind(path: str) -> tuple[str, str]:
    """Lower-case ending without compression, and compression ('' if none)."""
    suffixes = [""] + [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1] in COMPRESSIONS:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def _lines(stream: BufferedReader, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their ends and without a byte order mark; None for one of more than `max_bytes`."""
    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))
    longest = max_bytes + len(b"\r\n")
    while line := stream.readline(longest):
        is_cut = len(line) == longest and not line.endswith(b"\n")
        rest = line
        while is_cut and rest and not rest.endswith(b"\n"):
            rest = stream.readline(BUFFER_BYTES)
        content = line.rstrip(b"\r\n")
        yield None if is_cut or len(content) > max_bytes else content


def _json_records(stream: BufferedReader, max_bytes: int) -> Iterator[Record]:
    for number, line in enumerate(_lines(stream, max_bytes), 1):
        if line is None or line.strip():
            yield Record(number, line)


def _text_records(stream: BufferedReader, max_bytes: int) -> Iterator[Record]:
    lines: list[bytes] = []
    first = size = 0
    for number, line in enumerate(chain(_lines(stream, max_bytes), [b""]), 1):
        if line is None or line.strip():
            first = first or number
            size += (max_bytes if line is None else len(line)) + 1
            if line is None or size > max_bytes + 1:
                size = max_bytes + 2
                lines.clear()
            else:
                lines.append(line)
        elif size:
            yield Record(first, b"\n".join(lines) if size <= max_bytes + 1 else None)
            lines.clear()
            first = size = 0
