"""The files a preprocessing run reads: which, and the chunks they are cut into.

A pattern is a file, a folder (all files of a known kind below it, but none that this program has written) or a glob;
`NAME=PATTERN` puts its files under the source NAME. Chunks are a pure function of the files' sizes and the chunk size,
so that any number of workers or machines can share them out.
"""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.text.first_bytes import FIRST_BYTES, compression_of, encoding_of, holds_json_values, misread
from metro_megatron.text.parquet import row_group_bytes
from metro_megatron.text.streams import BUFFER_BYTES, FileBytes, utf8_stream

JSON_LINES, PLAIN_TEXT, PARQUET = (".jsonl", ".json", ".ndjson"), (".txt",), (".parquet",)
COMPRESSIONS = (".gz", ".zst", ".bz2")

_UNSPEAKABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Line ends and bytes that are not UTF-8: neither a message nor a manifest can hold them."""

_OWN_FOLDERS = (
    {"plan.json", "lock"},
    {"run_config.yaml"},
    {"index.json", "start.bin"},
    {"config.json", "model.safetensors"},
)
"""Files that mark a folder as this program's: unfinished work, a run, an index of samples, a model."""
_MARKS_OF_TOKENIZER = ({"tokenizer.json"}, {"tokenizer_config.json"}, {"config.json", "vocab.txt"})
_OF_TOKENIZER = {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "report.json"}.union(
    *_MARKS_OF_TOKENIZER
)
"""Files of anyone's tokenizer, where some of them mark a folder as one's."""
_MANIFEST = ".manifest.json"
_MAGIC = re.compile(r"[*?\[]")
_BEFORE_JSON = b" \t\r\n\x1e\xef\xbb\xbf"
"""White space, and the bytes of a mark."""
_OWN = "of this program's own"
_MOST_NAMED = 5

_SMALLEST_CHUNK = 4
"""Bytes; the first line of a file begins in the first chunk, behind a byte order mark of 3."""


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the run was planned."""

    source: str
    """Name of its source; "" where none was given."""
    path: str
    size: int
    compression: str = ""
    """One of COMPRESSIONS, or "": what the first bytes say, else the name."""
    encoding: str = ""
    """Python's name of it, "" for UTF-8: what the first bytes say."""
    holds_json_values: bool = False
    """Whether it is an array of JSON objects, or has them over several lines; else one is a line."""

    @property
    def is_one_chunk(self) -> bool:
        """Whether it can only be read from its first byte on."""
        return bool(self.compression or self.encoding or self.holds_json_values)

    @property
    def ending(self) -> str:
        """Lower-case ending without compression."""
        return kind(self.path)[0]

    def stat(self) -> os.stat_result:
        """Of the file now. Raises UserError if there is none."""
        try:
            return os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def check_size(self) -> None:
        """Raise UserError if the file has another size than planned; of its bytes, hashes say whether they changed."""
        size = self.stat().st_size
        if size != self.size:
            raise UserError(
                f"{self.path}: changed since the run was planned ({self.size:,} bytes then, {size:,} now); give the "
                "same command again when nobody writes to it"
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


def find_inputs(patterns: Sequence[str], on_left_out: Callable[[str], object] = lambda line: None) -> list[InputFile]:
    """All files of the patterns, by pattern, then by path; `on_left_out` hears in a line which were passed over.

    Raises UserError for everything that is wrong with them: patterns without files, files that cannot be read, of
    an unknown kind or given twice, folders that cannot be listed or that contain themselves, names that are no
    plain names.
    """
    files: list[InputFile] = []
    problems = [] if patterns else ["no input files given"]
    left_out: Counter[str] = Counter()
    for text in patterns:
        source, pattern = _split(text)
        if source and not source.replace("-", "").replace("_", "").isalnum():
            problems.append(f"{text}: source name {source!r} may have letters, digits, - and _ only")
            continue
        try:
            paths = list(_expand(pattern, left_out))
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
    problems += _given_twice(files)
    if problems:
        raise UserError(problems)
    if left_out:
        most = Counter(dict(left_out.most_common(_MOST_NAMED)))
        most["others"] = left_out.total() - most.total()
        listed = ", ".join(f"{count:,} {what}" for what, count in (+most).items())
        on_left_out(f"left out of folders and globs: {listed}; a file that is named is read")
    return files


def _given_twice(files: Sequence[InputFile]) -> Iterator[str]:
    """A line for each file that has several of these names, by links of any kind or spellings."""
    places: dict[object, list[str]] = {}
    for file in files:
        with suppress(OSError):  # it is gone, which its reader says
            status = os.stat(file.path)
            # Numbers alone are not unique on every network file system.
            key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            places.setdefault(key, []).append(file.path)
    for first, *others in places.values():
        if others:
            names = ", ".join(dict.fromkeys(other for other in others if other != first))
            yield f"{first}: given {len(others) + 1} times{f', as {names}' if names else ''}; name it once"


def plan_chunks(files: Sequence[InputFile], chunk_bytes: int) -> list[Chunk]:
    """The chunks of all files in order: byte ranges of plain files, others whole, Parquet by row groups."""
    chunks: list[Chunk] = []
    for file in files:
        chunks += [Chunk(len(chunks) + i, file, *bounds) for i, bounds in enumerate(_bounds(file, chunk_bytes))]
    return chunks


def _bounds(file: InputFile, chunk_bytes: int) -> list[tuple[int, int]]:
    if file.ending in PARQUET:
        return _grouped(row_group_bytes(file.path), chunk_bytes)
    if file.is_one_chunk:
        return [(0, file.size)]
    step = max(chunk_bytes, _SMALLEST_CHUNK)
    return [(begin, min(begin + step, file.size)) for begin in range(0, max(file.size, 1), step)]


def _grouped(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive ranges of items whose sizes add up to `limit` at most, or of one item."""
    bounds, begin, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > begin and total + size > limit:
            bounds.append((begin, index))
            begin, total = index, 0
        total += size
    return [*bounds, (begin, len(sizes))]


def _split(text: str) -> tuple[str, str]:
    """(source, pattern); a `=` in a path that exists, or a glob of some that do, belongs to the path."""
    source, mark, pattern = text.partition("=")
    if not mark or "/" in source or os.path.exists(text) or _matches(text):
        return "", text
    return source, pattern


def _matches(pattern: str) -> list[str]:
    """Paths that a glob names; where there are none, its brackets stand for themselves."""
    found = glob.glob(pattern, recursive=True)
    return sorted(found or glob.glob(pattern.replace("[", "[[]"), recursive=True))


def _expand(pattern: str, left_out: Counter[str]) -> Iterator[str]:
    if os.path.isdir(pattern):
        yield from _walk(pattern, frozenset(), left_out)
    elif os.path.lexists(pattern):
        yield pattern
    else:
        own, top = cache(_own_files), os.path.dirname(_MAGIC.split(pattern)[0])
        for path in _matches(pattern):
            if _is_own(path, top, own):
                left_out[_OWN] += 1
            elif not os.path.isdir(path):
                yield path
            elif "**" not in pattern:  # which names what is in folders itself
                yield from _walk(path, frozenset(), left_out)


def _is_own(path: str, top: str, own: Callable[[str], set[str]]) -> bool:
    """Whether this program has written a file, or a folder that it is in, below `top`."""
    while True:
        folder, name = os.path.split(path)
        if name in own(folder):
            return True
        if len(folder) <= len(top):
            return False
        path = folder


def _own_files(folder: str) -> set[str]:
    """Names of the files of a folder that this program has written; of a folder of its own those of all."""
    try:
        names = set(os.listdir(folder or "."))
    except OSError:
        return set()
    if any(marks <= names for marks in _OWN_FOLDERS):
        return names
    manifests = {name for name in names if name.endswith(_MANIFEST)}
    own = {name for name in manifests if f"{name.removesuffix(_MANIFEST)}.tokenizer" in names}
    has_tokenizer = any(marks <= names for marks in _MARKS_OF_TOKENIZER)
    return own | (names & _OF_TOKENIZER if has_tokenizer else set())


def _walk(folder: str, above: frozenset[tuple[int, int]], left_out: Counter[str]) -> Iterator[str]:
    """Files of a known kind below a folder, sorted; hidden ones and this program's are left out."""
    try:
        status = os.stat(folder)
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    this = (status.st_dev, status.st_ino)
    if this in above:
        raise UserError(f"{folder}: a link leads back to a folder above it; remove the link or name the files")
    own = _own_files(folder)
    for name in names:
        path = os.path.join(folder, name)
        if name in own:
            left_out[_OWN] += 1
        elif os.path.isdir(path):
            yield from _walk(path, above | {this}, left_out)
        elif name.startswith("."):
            left_out["hidden"] += 1
        elif is_known(path):
            yield path
        else:
            left_out["".join(kind(path)) or "without ending"] += 1


def _stat(source: str, path: str) -> InputFile:
    if not is_known(path):
        raise UserError(f"{path}: unknown kind of file; names end in {_known()}")
    if _UNSPEAKABLE.search(path):
        raise UserError(f"{ascii(path)}: the name has characters that cannot be written down; rename it")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever writes into it
            raise UserError(f"{path}: is no file, but a pipe, socket or device; write its content into a file")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            first_bytes = file.read(FIRST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    ending, by_name = kind(path)
    if ending in PARQUET:
        return InputFile(source, path, status.st_size)
    compression = compression_of(first_bytes, by_name)
    is_json = ending in JSON_LINES
    if compression and first_bytes:
        first_bytes = _first_bytes(path, compression)
    if encoding := encoding_of(first_bytes, is_json=is_json):
        first_bytes = _first_bytes(path, compression, encoding)
    if problem := misread(first_bytes, is_json=is_json):
        raise UserError(f"{path}: {problem}")
    has_values = is_json and holds_json_values(_json_begin(path, compression, encoding))
    return InputFile(source, path, status.st_size, compression, encoding, has_values)


def _first_bytes(path: str, compression: str, encoding: str = "") -> bytes:
    """What a file begins with, decompressed and as UTF-8; empty for one that is damaged, which reading names."""
    with suppress(UserError), FileBytes(path) as stored, utf8_stream(stored, compression, encoding) as stream:
        return stream.read(FIRST_BYTES)
    return b""


def _json_begin(path: str, compression: str, encoding: str) -> bytes:
    """What JSON begins with, as `_first_bytes`, but behind blanks of any length, and as long as a line may be."""
    begin = b""
    with suppress(UserError), FileBytes(path) as stored, utf8_stream(stored, compression, encoding) as stream:
        while not begin and (block := stream.read(BUFFER_BYTES)):
            begin = block.lstrip(_BEFORE_JSON)
        begin += stream.read(BUFFER_BYTES)
    return begin


def _known() -> str:
    return f"{', '.join(JSON_LINES + PLAIN_TEXT)} (then optionally {', '.join(COMPRESSIONS)}), or .parquet"
