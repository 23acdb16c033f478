"""Parts: encoded documents on the disk, in sections that are read a block at a time.

Sections: token ids, tokens of each unit (int32), last unit + 1 of each document (int64, from the part's first),
and the 16-byte hash of each document where duplicates are dropped. A chunk's part has a file for each; a finished
shard is read as a part too. All little-endian.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from metro_megatron.data.blocks import BLOCK_BYTES, CHECKSUM_BYTES, describe_damage, num_blocks
from metro_megatron.data.manifest import DatasetPaths, Manifest, ShardPaths
from metro_megatron.data.shards import INDEX_HEADER, token_dtype
from metro_megatron.errors import UserError
from metro_megatron.files import opened, whole_files

HASH_BYTES = 16
SECTIONS = ("tokens", "units", "documents", "hashes")

_BLOCK_DOCUMENTS = 1 << 16
_BLOCK_UNITS = 1 << 20
"""A block ends at whichever comes first: memory is bounded for many short documents and for few long ones."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Section:
    """Numbers of one dtype from byte `offset` of a file."""

    path: Path
    dtype: np.dtype[Any]
    offset: int = 0

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Numbers begin to end."""
        offset = self.offset + begin * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, end - begin, offset=offset)


@dataclass(frozen=True)
class CheckedSection(Section):
    """Ids of a finished shard, whose blocks are compared with their checksums when they are read."""

    checksums: Path = Path()

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Numbers begin to end. Raises UserError naming shard, block and bytes of what is damaged."""
        size = self.dtype.itemsize
        first, last = begin * size // BLOCK_BYTES, num_blocks(end * size)
        start, count = first * BLOCK_BYTES, last - first
        content = np.fromfile(self.path, np.uint8, count * BLOCK_BYTES, offset=start)  # the last block may be shorter
        expected = np.fromfile(self.checksums, "<u4", count, offset=first * CHECKSUM_BYTES).tolist()
        pieces = [content.data[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
        found = list(map(crc32, pieces))
        each = zip(range(first, last), map(len, pieces), found, expected, strict=True)
        if found != expected:
            raise UserError([describe_damage(str(self.path), *one) for one in each if one[2] != one[3]])
        return content[begin * size - start : end * size - start].view(self.dtype)


@dataclass(frozen=True)
class Block:
    """Consecutive documents of a part: D documents of U units and T tokens. Their ids stay on the disk."""

    first_document: int
    """Number in the part."""
    first_token: int
    """Index in the section of tokens."""
    unit_lengths: NDArray[np.int32]
    """[U] tokens of each unit."""
    unit_starts: NDArray[np.int64]
    """[D + 1] 0, first unit of each document but the first, U."""
    token_starts: NDArray[np.int64]
    """[D + 1] 0, first token of each document but the first, T."""


@dataclass(frozen=True)
class Part:
    """Documents begin_document to end_document of some sections."""

    tokens: Section
    units: Section
    documents: Section
    hashes: Section | None
    end_document: int
    begin_document: int = 0

    @classmethod
    def of_chunk(cls, stem: Path, dtype: np.dtype[Any], num_documents: int, has_hashes: bool) -> "Part":
        """The part that `PartWriter` wrote to `part_paths(stem)`."""
        tokens, units, documents, hashes = part_paths(stem)
        return cls(
            Section(tokens, dtype.newbyteorder("<")),
            Section(units, np.dtype("<i4")),
            Section(documents, np.dtype("<i8")),
            Section(hashes, np.dtype(f"V{HASH_BYTES}")) if has_hashes else None,
            num_documents,
        )

    @classmethod
    def of_shard(cls, prefix: str, dtype: np.dtype[Any], num_units: int, num_documents: int) -> "Part":
        """A finished shard; its .idx holds the document index behind lengths and offsets."""
        paths = ShardPaths(prefix)
        documents = INDEX_HEADER.size + 12 * num_units + 8
        return cls(
            Section(paths.bin, dtype.newbyteorder("<")),
            Section(paths.idx, np.dtype("<i4"), INDEX_HEADER.size),
            Section(paths.idx, np.dtype("<i8"), documents),
            None,
            num_documents,
        )

    @classmethod
    def of_dataset(cls, prefix: str, manifest: Manifest, number: int) -> "Part":
        """Shard `number` of a dataset."""
        shard = manifest.shards[number]
        dtype = token_dtype(manifest.vocab_size)
        paths = DatasetPaths(prefix).shard(number)
        part = cls.of_shard(paths.prefix, dtype, shard.units, shard.documents)
        if shard.crc is None:
            return part
        return replace(part, tokens=CheckedSection(paths.bin, part.tokens.dtype, checksums=paths.crc))

    def __len__(self) -> int:
        return self.end_document - self.begin_document

    def from_document(self, begin: int, end: int) -> "Part":
        """Only documents begin to end, counted from this part's first."""
        return replace(self, begin_document=self.begin_document + begin, end_document=self.begin_document + end)

    def blocks(self) -> Iterator[Block]:
        """All documents, in blocks of bounded size (one document at least)."""
        document = self.begin_document
        unit = int(self.documents.read(document - 1, document)[0]) if document else 0
        token = self._tokens_before(unit)
        while document < self.end_document:
            last = min(self.end_document, document + _BLOCK_DOCUMENTS)
            ends = self.documents.read(document, last).astype(np.int64)
            count = max(1, int(np.searchsorted(ends, unit + _BLOCK_UNITS, side="right")))
            unit_starts = np.concatenate([[0], ends[:count] - unit])
            lengths = self.units.read(unit, int(ends[count - 1])).astype(np.int32)
            token_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[unit_starts]
            yield Block(document - self.begin_document, token, lengths, unit_starts, token_starts)
            document += count
            unit = int(ends[count - 1])
            token += int(token_starts[-1])

    def document_hashes(self, begin: int, end: int) -> NDArray[np.uint64]:
        """[end - begin, 2] the hashes of documents begin to end, counted from this part's first."""
        assert self.hashes is not None
        raw = self.hashes.read(self.begin_document + begin, self.begin_document + end)
        return raw.view("<u8").reshape(-1, 2)

    def _tokens_before(self, unit: int) -> int:
        starts = range(0, unit, _BLOCK_UNITS)
        blocks = (self.units.read(start, min(unit, start + _BLOCK_UNITS)) for start in starts)
        return sum(int(block.sum(dtype=np.int64)) for block in blocks)


def source_blocks(prefix: str, manifest: Manifest) -> Iterator[tuple[int, Block]]:
    """(source, documents) of all shards of a dataset in order; no block holds documents of two sources or shards."""
    for number in range(len(manifest.shards)):
        part = Part.of_dataset(prefix, manifest, number)
        for source, begin, end in manifest.runs(number):
            for block in part.from_document(begin, end).blocks():
                yield source, block


def part_paths(stem: Path) -> list[Path]:
    """Files of a chunk's part, in the order of SECTIONS."""
    return [stem.with_name(f"{stem.name}.{section}") for section in SECTIONS]


def join_hashes(parts: Sequence[Part], path: Path) -> None:
    """Write the hashes of all documents of all parts as one file."""
    with whole_files([path]) as (file,):
        for part in parts:
            for begin in range(0, len(part), _BLOCK_DOCUMENTS):
                hashes = part.document_hashes(begin, min(len(part), begin + _BLOCK_DOCUMENTS))
                file.write(np.ascontiguousarray(hashes).data)


def damaged_section(stem: Path, checksums: Sequence[int], first: int = 0) -> Path | None:
    """The first file of a chunk's part, from section number `first` on, that is missing or has another CRC-32; None if
    all are whole."""
    for path, expected in list(zip(part_paths(stem), checksums, strict=False))[first:]:
        if not path.is_file() or _crc32(path) != expected:
            return path
    return None


def _crc32(path: Path) -> int:
    found = 0
    with opened(path) as file:
        while block := file.read(_READ_BYTES):
            found = crc32(block, found)
    return found


class PartWriter:
    """Appends whole documents to the four files of a part."""

    def __init__(self, files: list[BinaryIO], dtype: np.dtype[Any]):
        self._files = files
        self._sums = [0] * len(files)
        self._dtype = dtype.newbyteorder("<")
        self.documents = self.units = self.tokens = 0

    def append(
        self,
        tokens: NDArray[np.integer],
        unit_lengths: NDArray[np.int32],
        document_units: NDArray[np.int64],
        hashes: bytes,
    ) -> None:
        """Ids [T], tokens per unit [U], units per document [D], hashes of D documents or nothing."""
        assert int(unit_lengths.sum()) == len(tokens) and int(document_units.sum()) == len(unit_lengths)
        arrays: tuple[NDArray[Any], ...] = (
            np.ascontiguousarray(tokens, self._dtype),
            np.ascontiguousarray(unit_lengths, "<i4"),
            (self.units + np.cumsum(document_units)).astype("<i8"),
            np.frombuffer(hashes, np.uint8),
        )
        for number, (file, array) in enumerate(zip(self._files, arrays, strict=True)):
            content = array.view(np.uint8)
            file.write(content.data)
            self._sums[number] = crc32(content, self._sums[number])
        self.documents += len(document_units)
        self.units += len(unit_lengths)
        self.tokens += len(tokens)

    @property
    def checksums(self) -> tuple[int, ...]:
        """CRC-32 of each file so far."""
        return tuple(self._sums)
