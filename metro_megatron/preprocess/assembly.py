"""Parts become shards: streamed in order, cut by size at document boundaries, duplicates left out.

After every shard a journal entry tells where the next begins, so that an interrupted assembly goes on there, and the
parts that no shard needs any more go: the disk holds the ids about once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.preprocess.journal import Journal
from metro_megatron.preprocess.parts import Block, Part
from metro_megatron.preprocess.shard_writer import ShardWriter, shard_writer
from metro_megatron.preprocess.statistics import LengthHistogram

_BLOCK_TOKENS = 1 << 20


@dataclass
class Statistics:
    """What one source contributed."""

    documents: int = 0
    units: int = 0
    tokens: int = 0
    document_lengths: LengthHistogram = field(default_factory=LengthHistogram)
    unit_lengths: LengthHistogram = field(default_factory=LengthHistogram)

    def add(self, document_tokens: NDArray[np.int64], unit_lengths: NDArray[np.int32]) -> None:
        self.documents += len(document_tokens)
        self.units += len(unit_lengths)
        self.tokens += int(document_tokens.sum())
        self.document_lengths += LengthHistogram.from_lengths(document_tokens)
        self.unit_lengths += LengthHistogram.from_lengths(unit_lengths)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.documents + other.documents,
            self.units + other.units,
            self.tokens + other.tokens,
            self.document_lengths + other.document_lengths,
            self.unit_lengths + other.unit_lengths,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "units": self.units,
            "tokens": self.tokens,
            "document_lengths": self.document_lengths.to_json(),
            "unit_lengths": self.unit_lengths.to_json(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Statistics":
        return cls(
            content["documents"],
            content["units"],
            content["tokens"],
            LengthHistogram.from_json(content["document_lengths"]),
            LengthHistogram.from_json(content["unit_lengths"]),
        )


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

    shards: list[dict[str, Any]]
    sources: list[Statistics]


def assemble(
    journal: Journal, parts: Sequence[Part], part_sources: Sequence[int], options: AssemblyOptions
) -> Assembled:
    """Write shard-00000.bin and .idx, shard-00001... in the journal's folder from all parts in order.

    `part_sources` says which source, numbered from 0, each part belongs to. Parts behind the shards that an earlier
    call finished may be gone; all else must be as it was then.
    """
    return _Assembly(journal, parts, part_sources, options).run()


@dataclass(frozen=True)
class _Piece:
    """Documents begin to end of a block, all kept."""

    part: int
    place: int
    """Of the block's first document in the part."""
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
        self._sources = [Statistics() for _ in range(max(part_sources, default=-1) + 1)]
        self._shards: list[dict[str, Any]] = []
        self._place = (0, 0)
        """Part and document in it where the next shard begins."""

    def run(self) -> Assembled:
        self._resume()
        pieces = _Pushback(self._pieces())
        while (first := next(pieces, None)) is not None:
            pieces.push(first)
            prefix = str(self._journal.folder / shard_name(len(self._shards)))
            with shard_writer(prefix, self._options.dtype) as writer:
                self._fill(writer, pieces)
                self._shards.append(writer.finish())
            self._record()
        return Assembled(self._shards, self._sources)

    def _resume(self) -> None:
        while entry := self._journal.entry(f"{shard_name(len(self._shards))}.json"):
            self._shards.append(entry["shard"])
            self._sources = [Statistics.from_json(source) for source in entry["sources"]]
            self._place = (entry["next_part"], entry["next_document"])
        self._drop_parts()

    def _record(self) -> None:
        part, document = self._place
        entry = {
            "shard": self._shards[-1],
            "next_part": part,
            "next_document": document,
            "sources": [source.to_json() for source in self._sources],
        }
        self._journal.write_entry(f"{shard_name(len(self._shards) - 1)}.json", entry)
        self._drop_parts()

    def _drop_parts(self) -> None:
        for number in range(self._place[0]):
            self._options.on_part_done(number)

    def _fill(self, writer: ShardWriter, pieces: "_Pushback") -> None:
        """Write pieces until the shard is full; what does not fit is pushed back."""
        room = self._options.shard_bytes // self._options.dtype.itemsize
        for piece in pieces:
            ends = np.cumsum(piece.document_tokens)
            fitting = int(np.searchsorted(ends, room - writer.tokens, side="right"))
            if fitting == 0 and writer.documents == 0:
                fitting = 1
            cut = piece.begin + fitting
            if fitting:
                self._write(writer, replace(piece, end=cut))
            if cut < piece.end:
                pieces.push(replace(piece, begin=cut))
                return

    def _write(self, writer: ShardWriter, piece: _Piece) -> None:
        section = self._parts[piece.part].tokens
        first, last = piece.tokens
        starts = range(first, last, _BLOCK_TOKENS)
        writer.append(
            (section.read(start, min(last, start + _BLOCK_TOKENS)) for start in starts),
            piece.unit_lengths,
            piece.document_units,
        )
        self._sources[self._part_sources[piece.part]].add(piece.document_tokens, piece.unit_lengths)
        self._place = (piece.part, piece.place + piece.end)
        self._options.on_tokens(last - first)

    def _pieces(self) -> Iterator[_Piece]:
        first_part, first_document = self._place
        for number in range(first_part, len(self._parts)):
            begin = first_document if number == first_part else 0
            part = self._parts[number]
            for block in part.from_document(begin, len(part)).blocks():
                yield from self._kept(number, begin + block.first_document, block)

    def _kept(self, number: int, place: int, block: Block) -> Iterator[_Piece]:
        """The runs of documents of a block that are no duplicates."""
        count = len(block.unit_starts) - 1
        flags = np.zeros(count, np.uint8)
        if self._options.duplicates:
            flags = np.fromfile(self._options.duplicates, np.uint8, count, offset=int(self._starts[number]) + place)
        borders = np.flatnonzero(np.diff(flags, prepend=1, append=1))
        for begin, end in borders.reshape(-1, 2):
            yield _Piece(number, place, block, int(begin), int(end))


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
