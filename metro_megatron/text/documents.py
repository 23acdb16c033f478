"""Reading documents from chunks of files: JSON, plain text with blank lines between documents, Parquet.

Two steps: `ChunkReader` cuts a chunk into raw records in bounded memory, `parse_record` makes a document of one, cut
into units, or says why not. A document belongs to the chunk in which it begins, so that the documents of a file do
not depend on how it is cut. Samples are later made of whole units of one document.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader, BytesIO

import orjson

from metro_megatron.text.inputs import JSON_LINES, PARQUET, Chunk, InputFile, plan_chunks
from metro_megatron.text.json_values import json_values
from metro_megatron.text.parquet import read_rows, row_groups_place
from metro_megatron.text.records import Record, Reject
from metro_megatron.text.streams import BUFFER_BYTES, FileBytes, utf8_stream

MAX_DOCUMENT_BYTES = 10_000_000
"""Default limit of a record. The longest books are about half as long; encoding so much takes below 1 GB."""

CHUNK_BYTES = 32 << 20
"""Size of the chunks that large files are cut into; also of the pieces whose hashes manifests hold."""

_BOM = b"\xef\xbb\xbf"
_NUL = "\0"
_SEPARATOR = b"\x1e"
_SEVERAL = re.compile(rb'\}[ \t\x1e]*+\{[ \t]*+"')
"""Where one object may follow another in a line, as no object does inside of one."""
_CONTINUING = bytes(range(0x80, 0xC0))
"""Bytes of a character in UTF-8 behind its first."""
_BLANK = re.compile(
    rb"(?:%b)*+\Z" % b"|".join(re.escape(chr(code).encode()) for code in range(0x3001) if chr(code).isspace())
)
"""White space as Python's strings have it, in UTF-8: a line that is nothing else has no text."""


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents."""

    text_keys: tuple[str, ...] = ("text",)
    """Keys of the text in JSON objects, columns of Parquet; several are joined by a line end."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    unit: str = "line"
    """One of UNITS."""


class ChunkReader:
    """Iterates the records of a chunk, once, in bounded memory.

    Raises UserError if the file cannot be read or is not what was planned, or if compressed data is damaged.
    """

    def __init__(self, chunk: Chunk, options: ReadOptions):
        self.chunk = chunk
        self.bytes_read = 0
        """Of the chunk's bytes."""
        self.sha256 = ""
        """Of the chunk's bytes, known after the last record. Of Parquet those of its row groups; of the file for the
        first chunk, as what is said of all of them stands at its end."""
        self._options = options

    def __iter__(self) -> Iterator[Record]:
        file = self.chunk.file
        file.check_size()
        yield from self._parquet() if file.ending in PARQUET else self._lines()
        file.check_size()
        self.bytes_read = file.size if file.is_one_chunk else self.chunk.end - self.chunk.begin

    def _lines(self) -> Iterator[Record]:
        chunk = self.chunk
        # From the byte before: if that is a line end, a line begins with the chunk.
        stored = FileBytes(chunk.file.path, chunk.begin, chunk.end, max(0, chunk.begin - 1))
        with utf8_stream(stored, chunk.file.compression, chunk.file.encoding) as stream:
            for record in self._records_of(stream):
                self.bytes_read = max(0, min(stored.position, chunk.end) - chunk.begin)
                yield record
        self.sha256 = stored.finish()

    def _records_of(self, stream: BufferedReader) -> Iterator[Record]:
        chunk, limit = self.chunk, self._options.max_document_bytes
        if chunk.file.holds_json_values:
            return json_values(stream, limit)
        lines = _Lines(stream, chunk.begin, None if chunk.file.is_one_chunk else chunk.end, limit)
        if chunk.file.ending in JSON_LINES:
            return _json_records(lines)
        is_inside = chunk.begin > 0 and _is_after_text(chunk.file.path, lines.offset)
        return _text_records(lines, limit, is_inside)

    def _parquet(self) -> Iterator[Record]:
        chunk, limit = self.chunk, self._options.max_document_bytes
        self.sha256 = stored_bytes(chunk.file, chunk.begin, chunk.end).finish()
        for row, values in read_rows(chunk.file.path, range(chunk.begin, chunk.end), self._options.text_keys):
            yield Record(row, _from_values(values, limit), is_json=False)


def stored_bytes(file: InputFile, begin: int, end: int) -> FileBytes:
    """The bytes of a chunk, begin to end, of which `ChunkReader.sha256` is the hash."""
    if file.ending not in PARQUET:
        return FileBytes(file.path, begin, end)
    return FileBytes(file.path, *row_groups_place(file.path, range(begin, end))) if begin else FileBytes(file.path)


@dataclass(frozen=True, slots=True)
class SourcedDocument:
    """A document's units, and the name of its source ("" where none was given)."""

    units: list[str]
    source: str = ""


def read_documents(
    files: Sequence[InputFile],
    rejects: Counter[Reject],
    options: ReadOptions = ReadOptions(),
    on_progress: Callable[[int], object] = lambda position: None,
) -> Iterator[SourcedDocument]:
    """All documents of the files in order; rejects are counted into `rejects`.

    `on_progress` hears how many bytes of the files are read. Raises UserError if a file cannot be read.
    """
    finished = 0
    for chunk in plan_chunks(files, CHUNK_BYTES):
        reader = ChunkReader(chunk, options)
        for record in reader:
            units = parse_record(record, options)
            if isinstance(units, Reject):
                rejects[units] += 1
            else:
                on_progress(finished + reader.bytes_read)
                yield SourcedDocument(units, chunk.file.source)
        finished += reader.bytes_read


def parse_record(record: Record, options: ReadOptions) -> list[str] | Reject:
    """The document of a record: its units. Never raises."""
    text = record.raw
    if isinstance(text, bytes):
        text = _from_json(text, options.text_keys) if record.is_json else _decoded(text)
    if isinstance(text, Reject):
        return text
    if _NUL in text:
        return Reject.NUL
    return UNITS[options.unit](text) or Reject.EMPTY


def _from_json(raw: bytes, keys: Sequence[str]) -> str | Reject:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        is_utf8 = not isinstance(_decoded(raw), Reject)
        return Reject.INVALID_JSON if is_utf8 else Reject.NOT_UTF8
    if not isinstance(value, dict):
        return Reject.NOT_AN_OBJECT
    if any(key not in value for key in keys):
        return Reject.MISSING_KEY
    texts = [value[key] for key in keys]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else Reject.NOT_A_STRING


def _decoded(raw: bytes) -> str | Reject:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return Reject.NOT_UTF8


def _from_values(values: Sequence[object], max_bytes: int) -> str | Reject:
    """The text of a row; columns of bytes, as writers without a type for strings leave them, hold text, too."""
    texts = [_decoded(value) if isinstance(value, bytes) else value for value in values]
    if any(text is Reject.NOT_UTF8 for text in texts):
        return Reject.NOT_UTF8
    is_text = all(isinstance(text, str) for text in texts)
    return _limited("\n".join(map(str, texts)), max_bytes) if is_text else Reject.NOT_A_STRING


def _limited(text: str, max_bytes: int) -> str | Reject:
    is_short = len(text) * 4 <= max_bytes or len(text.encode()) <= max_bytes
    return text if is_short else Reject.TOO_LONG


class _Lines:
    """The lines of a chunk: those that begin in [begin, end), and in `offset` where the next one begins.

    `stream` is at max(0, begin - 1), so that a line that begins at `begin` is told from one that goes on.
    """

    def __init__(self, stream: BufferedReader, begin: int, end: int | None, max_bytes: int):
        self._stream, self._end, self._longest = stream, end, max_bytes + len(b"\r\n")
        self.offset = begin
        if begin > 0:
            self._skip(begin - 1)
        elif stream.peek(len(_BOM)).startswith(_BOM):
            self.offset += len(stream.read(len(_BOM)))

    @property
    def is_over(self) -> bool:
        """Whether the next line belongs to the next chunk."""
        return self._end is not None and self.offset >= self._end

    def next(self) -> tuple[bytes, bool] | None:
        """The next line without its end, and whether it is longer than allowed (and cut); None after the last."""
        line = self._stream.readline(self._longest)
        if not line:
            return None
        self.offset += len(line)
        is_cut = len(line) == self._longest and not line.endswith(b"\n")
        rest = line
        while is_cut and rest and not rest.endswith(b"\n"):
            rest = self._stream.readline(BUFFER_BYTES)
            self.offset += len(rest)
        content = line.rstrip(b"\r\n")
        return content, is_cut or len(content) > self._longest - len(b"\r\n")

    def _skip(self, offset: int) -> None:
        """Go to the first line that begins after `offset`; to the end of the chunk if there is none in it."""
        self.offset = offset
        rest = b" "
        while rest and not rest.endswith(b"\n") and not self.is_over:
            rest = self._stream.readline(BUFFER_BYTES)
            self.offset += len(rest)


def _is_blank(line: bytes) -> bool:
    return _BLANK.match(line) is not None


def _is_after_text(path: str, offset: int) -> bool:
    """Whether the line that ends before `offset` has more than white space; read backwards as far as needed."""
    end, rest = offset - 1, b""
    with open(path, "rb") as file:
        first = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(end)
        is_returned = file.read(1) == b"\n"
        while end > first:
            begin = max(first, end - BUFFER_BYTES)
            file.seek(begin)
            block = file.read(end - begin)
            if is_returned:
                is_returned, block = False, block.rstrip(b"\r")
            line = block[max(block.rfind(b"\n"), block.rfind(b"\r")) + 1 :]
            is_begun = len(line) < len(block) or begin == first
            # Of a character that the block cuts, the end is looked at together with its begin.
            cut = 0 if is_begun else len(line) - len(line.lstrip(_CONTINUING))
            if not _is_blank(line[cut:] + rest):
                return True
            if is_begun:
                return False
            end, rest = begin, line[:cut]
    return False


def _json_records(lines: _Lines) -> Iterator[Record]:
    while not lines.is_over:
        offset = lines.offset
        line = lines.next()
        if line is None:
            return
        content, is_too_long = line
        # Marked files that were joined: no JSON begins with a mark, or with RFC 7464's.
        content = content.removeprefix(_BOM).lstrip(_SEPARATOR)
        if is_too_long:
            yield Record(offset, Reject.TOO_LONG, is_json=True)
        elif _SEVERAL.search(content):
            for record in json_values(BufferedReader(BytesIO(content)), len(content)):  # type: ignore[arg-type]
                yield replace(record, position=offset + record.position)
        elif not _is_blank(content):
            yield Record(offset, content, is_json=True)


def _text_records(lines: _Lines, max_bytes: int, is_inside: bool) -> Iterator[Record]:
    """`is_inside`: the first lines go on with a document of the chunk before."""
    kept: list[bytes] = []
    first, size = 0, 0
    while is_inside and not lines.is_over:
        line = lines.next()
        is_inside = line is not None and (line[1] or not _is_blank(line[0]))
    while size or not lines.is_over:
        offset = lines.offset
        line = lines.next()
        content, is_too_long = line or (b"", False)
        if is_too_long or not _is_blank(content):
            first = first if size else offset
            size += len(content) + 1 + is_too_long * max_bytes
            if size <= max_bytes + 1:
                kept.append(content)
            else:
                kept.clear()
        elif size:
            yield Record(first, b"\n".join(kept) if size <= max_bytes + 1 else Reject.TOO_LONG, is_json=False)
            kept.clear()
            size = 0
        if line is None:
            return


_END = re.compile(r"""([.!?…]["'”’)\]]?)[ ]+(?=["'“‘(\[]?[A-Z0-9À-ÖØ-Þ])""")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Ms|Dr|St|vs|No|pp|cf|Jr|Sr|al|Mrs|etc|Fig|Vol|Rev|Gen|Col|Sen|Rep|Gov|Inc|Ltd"
    r"|e[.]g|i[.]e|Prof|Capt)\Z"
)
_LONGEST_ABBREVIATION = 4


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def sentences_of(text: str) -> list[str]:
    """Every line cut behind `.`, `!`, `?` or `…` (and a closing quote or bracket) where spaces and then a capital
    or a digit follow; not behind an initial or a common English abbreviation."""
    return [sentence for line in lines_of(text) for sentence in _cut(line)]


def _cut(line: str) -> Iterator[str]:
    begin = 0
    for match in _END.finditer(line):
        stop = match.start()
        if match[1] == "." and _ABBREVIATION.search(line, max(0, stop - _LONGEST_ABBREVIATION), stop):
            continue
        yield line[begin : match.end(1)]
        begin = match.end()
    yield line[begin:]


def document_of(text: str) -> list[str]:
    """The text as it is, with all its white space, as one unit; none if it is nothing but white space."""
    return [text] if text and not text.isspace() else []


UNITS: dict[str, Callable[[str], list[str]]] = {"line": lines_of, "sentence": sentences_of, "document": document_of}
