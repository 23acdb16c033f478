"""Which files a preprocessing run reads, and the chunks they are cut into.

A pattern is a file, a folder (all files of a known kind below it) or a glob; `NAME=PATTERN` puts its files under
the source NAME. Chunks are a pure function of the files' sizes and the chunk size, so that any number of workers
or machines can share them out.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metro_megatron.errors import UserError

JSON_LINES, PLAIN_TEXT, PARQUET = (".jsonl", ".json", ".ndjson"), (".txt",), (".parquet",)
COMPRESSIONS = (".gz", ".zst", ".bz2")

_SMALLEST_CHUNK = 4
"""Bytes; the first line of a file begins in the first chunk, behind a byte order mark of 3."""


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the run was planned."""

    source: str
    """Name of its source; "" where none was given."""
    path: str
    size: int
    mtime_ns: int

    @property
    def ending(self) -> str:
        """Lower-case ending without compression."""
        return kind(self.path)[0]

    @property
    def compression(self) -> str:
        """One of COMPRESSIONS, or ""."""
        return kind(self.path)[1]

    def check_unchanged(self) -> None:
        """Raise UserError if the file is not what was planned."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UserError(
                f"{self.path}: changed since the run was planned ({self.size:,} bytes then, {now.st_size:,} now); "
                "start again with --overwrite"
            )


@dataclass(frozen=True)
class Chunk:
    """The documents of a file that begin in its bytes [begin, end); in row groups for Parquet."""

    number: int
    file: InputFile
    begin: int
    end: int


def kind(path: str) -> tuple[str, str]:
    """Lower-case ending without compression, and compression ("" if none)."""
    suffixes = [""] + [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1] in COMPRESSIONS:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def is_known(path: str) -> bool:
    """Whether the name says how to read the file."""
    ending, compression = kind(path)
    return ending in JSON_LINES + PLAIN_TEXT or (ending in PARQUET and not compression)


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """All files of the patterns, by pattern, then by path.

    Raises UserError for everything that is wrong with them: patterns without files, files that cannot be read, of
    an unknown kind or given twice, folders that cannot be listed or that contain themselves, names that are no
    plain names.
    """
    files: list[InputFile] = []
    problems = [] if patterns else ["no input files given"]
    for text in patterns:
        source, pattern = _split(text)
        if source and not source.replace("-", "").replace("_", "").isalnum():
            problems.append(f"{text}: source name {source!r} may have letters, digits, - and _ only")
            continue
        try:
            paths = list(_expand(pattern))
        except UserError as error:
            problems += error.problems
            continue
        if not paths:
            problems.append(f"{pattern}: no such file, and no file of a known kind ({_known()}) matches it")
        for path in paths:
            try:
                files.append(_stat(source, path))
            except UserError as error:
                problems += error.problems
    real = Counter(os.path.realpath(file.path) for file in files)
    problems += [f"{path}: given {count} times; name it once" for path, count in real.items() if count > 1]
    if problems:
        raise UserError(problems)
    return files


def plan_chunks(files: Sequence[InputFile], chunk_bytes: int) -> list[Chunk]:
    """The chunks of all files in order: byte ranges of plain files, compressed files whole, Parquet by row groups."""
    chunks: list[Chunk] = []
    for file in files:
        chunks += [Chunk(len(chunks) + i, file, *bounds) for i, bounds in enumerate(_bounds(file, chunk_bytes))]
    return chunks


def _bounds(file: InputFile, chunk_bytes: int) -> list[tuple[int, int]]:
    if file.ending in PARQUET:
        from metro_megatron.text.parquet import row_group_bytes

        return _grouped(row_group_bytes(file.path), chunk_bytes)
    if file.compression:
        return [(0, file.size)]
    step = max(chunk_bytes, _SMALLEST_CHUNK)
    return [(begin, min(begin + step, file.size)) for begin in range(0, max(file.size, 1), step)]


def _grouped(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive ranges of items whose sizes add up to `limit` at most, or of one item."""
    bounds, begin, total = [], 0, 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > limit:
            bounds.append((begin, place))
            begin, total = place, 0
        total += size
    return [*bounds, (begin, len(sizes))]


def _split(text: str) -> tuple[str, str]:
    """(source, pattern); a `=` in a path that exists belongs to the path."""
    source, mark, pattern = text.partition("=")
    if not mark or "/" in source or os.path.exists(text):
        return "", text
    return source, pattern


def _expand(pattern: str) -> Iterator[str]:
    if os.path.isdir(pattern):
        yield from _walk(pattern, frozenset())
    elif os.path.lexists(pattern):
        yield pattern
    else:
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(path):
                yield path


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files of a known kind below a folder, sorted; hidden ones are left out."""
    try:
        status = os.stat(folder)
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    this = (status.st_dev, status.st_ino)
    if this in above:
        raise UserError(f"{folder}: a link leads back to a folder above it; remove the link or name the files")
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, above | {this})
        elif is_known(path) and not name.startswith("."):
            yield path


def _stat(source: str, path: str) -> InputFile:
    if not is_known(path):
        raise UserError(f"{path}: unknown kind of file; names end in {_known()}")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return InputFile(source, path, status.st_size, status.st_mtime_ns)


def _known() -> str:
    return f"{', '.join(JSON_LINES + PLAIN_TEXT)} (then optionally {', '.join(COMPRESSIONS)}), or .parquet"
