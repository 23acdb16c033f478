"""Parts become shards: streamed in order, cut by size at document boundaries, duplicates left out.

After every shard a journal entry tells where the next begins, so that an interrupted assembly goes on there, and the
parts that no shard needs any more go: the disk holds the ids about once.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.blocks import BlockSums
from metro_megatron.data.manifest import NO_DOCUMENTS, FileEntry, ShardContent, ShardPaths, Statistics
from metro_megatron.data.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION
from metro_megatron.files import whole_files
from metro_megatron.preprocess.journal import Journal, ShardStep
from metro_megatron.preprocess.parts import Block, Part

DOCUMENTS_PER_PASS = 1 << 22
"""About 250 MB of memory; 60 million documents take 15 passes over 1 GB."""

_BLOCK_DOCUMENTS = 1 << 18
_BLOCK_TOKENS = 1 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class AssemblyOptions:
    """How parts are joined."""

    dtype: np.dtype[Any]
    shard_bytes: int
    """Longest .bin; a longer document has a shard of its own."""
    duplicates: Path | None = None
    """What `find_duplicates` wrote about all parts."""
    on_part_done: Callable[[int], object] = lambda number: None
    """Called with the number of a part that is not needed any more."""
    on_tokens: Callable[[int], object] = lambda tokens: None
    """Called with tokens written, now and then."""


@dataclass
class Assembled:
    """What came of it: counts, sizes, hashes of every shard, and statistics of every source."""

    shards: list[ShardContent]
    sources: list[Statistics]


def assemble(
    journal: Journal, parts: Sequence[Part], part_sources: Sequence[int], options: AssemblyOptions
) -> Assembled:
    """Write shard-00000.bin, .idx and .crc, shard-00001... in the journal's folder from all parts in order.

    `part_sources` says which source, numbered from 0, each part belongs to. Parts behind the shards that an earlier
    call finished may be gone; all else must be as it was then.
    """
    return _Assembly(journal, parts, part_sources, options).run()


def first_needed_part(journal: Journal) -> int:
    """Number of the part where the shards that are finished end: those before it may be gone."""
    number, part = 0, 0
    while step := journal.entry(f"{shard_name(number)}.json", ShardStep):
        number, part = number + 1, step.next_part
    return part


@dataclass(frozen=True)
class _Piece:
    """Documents begin to end of a block, all kept."""

    part: int
    first_document: int
    """Number in the part of the block's first document."""
    block: Block
    begin: int
    end: int

    @property
    def document_tokens(self) -> NDArray[np.int64]:
        return np.diff(self.block.token_starts[self.begin : self.end + 1])

    @property
    def document_units(self) -> NDArray[np.int64]:
        return np.diff(self.block.unit_starts[self.begin : self.end + 1])

    @property
    def unit_lengths(self) -> NDArray[np.int32]:
        starts = self.block.unit_starts
        return self.block.unit_lengths[starts[self.begin] : starts[self.end]]

    @property
    def tokens(self) -> tuple[int, int]:
        """First and last + 1 in the part's section of tokens."""
        first, starts = self.block.first_token, self.block.token_starts
        return first + int(starts[self.begin]), first + int(starts[self.end])


class _Assembly:
    def __init__(self, journal: Journal, parts: Sequence[Part], part_sources: Sequence[int], options: AssemblyOptions):
        self._journal, self._parts, self._part_sources, self._options = journal, parts, part_sources, options
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        self._sources = [NO_DOCUMENTS for _ in range(max(part_sources, default=-1) + 1)]
        self._shards: list[ShardContent] = []
        self._next_part, self._next_document = 0, 0
        """Part, and document in it, where the next shard begins."""

    def run(self) -> Assembled:
        self._resume()
        pieces = _Pushback(self._pieces(self._next_part, self._next_document))
        while (first := next(pieces, None)) is not None:
            pieces.push(first)
            prefix = str(self._journal.folder / shard_name(len(self._shards)))
            with shard_writer(prefix, self._options.dtype) as writer:
                self._fill(writer, pieces)
                self._shards.append(writer.finish())
            self._record()
        return Assembled(self._shards, self._sources)

    def _resume(self) -> None:
        while step := self._journal.entry(f"{shard_name(len(self._shards))}.json", ShardStep):
            self._shards.append(step.shard)
            self._sources = list(step.sources)
            self._next_part, self._next_document = step.next_part, step.next_document
        self._drop_parts()

    def _record(self) -> None:
        step = ShardStep(self._shards[-1], self._next_part, self._next_document, tuple(self._sources))
        self._journal.write_entry(f"{shard_name(len(self._shards) - 1)}.json", step)
        # Only now: until its entry is written, a shard can be written again from its parts.
        self._drop_parts()

    def _drop_parts(self) -> None:
        for number in range(self._next_part):
            self._options.on_part_done(number)

    def _fill(self, writer: "ShardWriter", pieces: "_Pushback") -> None:
        """Write pieces until the shard is full; what does not fit is pushed back."""
        room = self._options.shard_bytes // self._options.dtype.itemsize
        for piece in pieces:
            ends = np.cumsum(piece.document_tokens)
            fitting = int(np.searchsorted(ends, room - writer.tokens, side="right"))
            if fitting == 0 and writer.documents == 0:
                fitting = 1  # a document that is longer than a shard has one of its own
            cut = piece.begin + fitting
            if fitting:
                self._write(writer, replace(piece, end=cut))
            if cut < piece.end:
                pieces.push(replace(piece, begin=cut))
                return

    def _write(self, writer: "ShardWriter", piece: _Piece) -> None:
        section = self._parts[piece.part].tokens
        first, last = piece.tokens
        starts = range(first, last, _BLOCK_TOKENS)
        writer.append(
            (section.read(start, min(last, start + _BLOCK_TOKENS)) for start in starts),
            piece.unit_lengths,
            piece.document_units,
        )
        self._sources[self._part_sources[piece.part]] += Statistics.of(piece.document_tokens, piece.unit_lengths)
        self._next_part, self._next_document = piece.part, piece.first_document + piece.end
        self._options.on_tokens(last - first)

    def _pieces(self, first_part: int, first_document: int) -> Iterator[_Piece]:
        for number in range(first_part, len(self._parts)):
            begin = first_document if number == first_part else 0
            part = self._parts[number]
            for block in part.from_document(begin, len(part)).blocks():
                yield from self._kept(number, begin + block.first_document, block)

    def _kept(self, number: int, first_document: int, block: Block) -> Iterator[_Piece]:
        """The runs of documents of a block that are no duplicates."""
        count = len(block.unit_starts) - 1
        flags = np.zeros(count, np.uint8)
        if self._options.duplicates:
            first = int(self._starts[number]) + first_document
            flags = np.fromfile(self._options.duplicates, np.uint8, count, offset=first)
        borders = np.flatnonzero(np.diff(flags, prepend=1, append=1))
        for begin, end in borders.reshape(-1, 2):
            yield _Piece(number, first_document, block, int(begin), int(end))


class _Pushback(Iterator[_Piece]):
    """An iterator that takes back one piece."""

    def __init__(self, pieces: Iterator[_Piece]):
        self._pieces = pieces
        self._waiting: list[_Piece] = []

    def __next__(self) -> _Piece:
        return self._waiting.pop() if self._waiting else next(self._pieces)

    def push(self, piece: _Piece) -> None:
        self._waiting.append(piece)


def shard_name(number: int) -> str:
    """Name of a shard in the work folder."""
    return f"shard-{number:05d}"


class ShardWriter:
    """Appends documents in bounded memory, then `finish`es; made by `shard_writer`.

    An index has all lengths before all documents, so both are collected in files of their own.
    """

    def __init__(self, files: list[BinaryIO], dtype: np.dtype[Any]):
        self._bin, self._idx, self._crc, self._lengths, self._documents = map(_HashedFile, files)
        self._sums = BlockSums()
        self._dtype = dtype
        self.documents = self.units = self.tokens = 0
        self._documents.write(np.zeros(1, "<i8"))

    def append(
        self,
        token_blocks: Iterable[NDArray[np.integer]],
        unit_lengths: NDArray[np.integer],
        document_units: NDArray[np.int64],
    ) -> None:
        """Append whole documents: their ids in any number of pieces, tokens per unit [U], units per document [D]."""
        assert int(document_units.sum()) == len(unit_lengths)
        written = 0
        for tokens in token_blocks:
            ids = np.ascontiguousarray(tokens, self._dtype.newbyteorder("<"))
            self._bin.write(ids)
            self._sums.update(ids.data.cast("B"))
            written += len(tokens)
        assert int(unit_lengths.sum(dtype=np.int64)) == written
        self._lengths.write(unit_lengths.astype("<i4", copy=False))
        self._documents.write((self.units + np.cumsum(document_units)).astype("<i8", copy=False))
        self.documents += len(document_units)
        self.units += len(unit_lengths)
        self.tokens += written

    def finish(self) -> ShardContent:
        """Write index and checksums; returns counts, sizes and hashes as the manifest holds them."""
        header = INDEX_HEADER.pack(
            INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[self._dtype.name], self.units, self.documents + 1
        )
        self._idx.write(np.frombuffer(header, np.uint8))
        for lengths in self._lengths.blocks("<i4"):
            self._idx.write(lengths)
        offset = 0
        for lengths in self._lengths.blocks("<i4"):
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            self._idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8"))
            offset = int(ends[-1])
        for documents in self._documents.blocks("<i8"):
            self._idx.write(documents)
        self._crc.write(self._sums.array())
        files = (file.entry() for file in (self._bin, self._idx, self._crc))
        return ShardContent(self.documents, self.units, self.tokens, *files)


@contextmanager
def shard_writer(prefix: str, dtype: np.dtype[Any]) -> Iterator[ShardWriter]:
    """A writer of `prefix`.bin, .idx and .crc, which appear when the block ends; nothing stays if it raises."""
    paths = ShardPaths(prefix)
    lengths, documents = (Path(f"{prefix}.{name}.scratch") for name in ("lengths", "documents"))
    try:
        with whole_files([*paths.files, lengths, documents]) as files:
            yield ShardWriter(files, dtype)
    finally:
        lengths.unlink(missing_ok=True)
        documents.unlink(missing_ok=True)


class _HashedFile:
    """A file of arrays, hashed and counted while written; its content can be read back in blocks."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, array: NDArray[Any]) -> None:
        if array.size:
            data = np.ascontiguousarray(array).data.cast("B")
            self._file.write(data)
            self._hash.update(data)
            self._bytes += len(data)

    def blocks(self, dtype: str) -> Iterator[NDArray[Any]]:
        self._file.seek(0)
        while data := self._file.read(_BLOCK_BYTES):
            yield np.frombuffer(data, dtype)
        assert self._file.tell() == self._bytes

    def entry(self) -> FileEntry:
        return FileEntry(self._bytes, self._hash.hexdigest())


def find_duplicates(parts: Sequence[Part], path: Path, documents_per_pass: int = DOCUMENTS_PER_PASS) -> int:
    """Write one byte per document of all parts in order, 1 where an earlier document has its 16-byte hash.

    Returns how many there are. `path` appears when it is whole. Memory is bounded: the range of the hashes is cut into
    as many equal pieces as documents_per_pass asks for, and each pass over the hashes looks at one.
    """
    total = sum(map(len, parts))
    passes = max(1, -(-total // documents_per_pass))
    step = -(-(1 << 64) // passes)
    count = 0
    with whole_files([path]) as (file,):
        flags = np.memmap(file, np.uint8, "w+", shape=(max(1, total),))
        for number in range(passes):
            numbers, keys = _in_range(parts, number * step, min((number + 1) * step, 1 << 64) - 1)
            order = np.lexsort((keys[:, 1], keys[:, 0]))
            ordered = keys[order]
            is_copy = (ordered[1:] == ordered[:-1]).all(axis=1)
            copies = numbers[order[1:][is_copy]]
            flags[copies] = 1
            count += len(copies)
        flags.flush()
    return count


def _in_range(parts: Sequence[Part], first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Numbers of documents [n] and their hashes [n, 2], of those with first <= first half of the hash <= last."""
    # Ascending: the stable sort by hash then leaves the first of equal documents in front.
    numbers, keys = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    start = 0
    for part in parts:
        for begin in range(0, len(part), _BLOCK_DOCUMENTS):
            hashes = part.document_hashes(begin, min(len(part), begin + _BLOCK_DOCUMENTS))
            chosen = np.flatnonzero((hashes[:, 0] >= np.uint64(first)) & (hashes[:, 0] <= np.uint64(last)))
            numbers.append(chosen + (start + begin))
            keys.append(hashes[chosen])
        start += len(part)
    return np.concatenate(numbers), np.concatenate(keys)
