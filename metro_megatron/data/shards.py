"""Datasets of token ids: numbered shards in megatron-core's IndexedDataset format, one manifest, one tokenizer.

A dataset prefix names PREFIX.manifest.json, PREFIX.tokenizer/ and PREFIX_00000.bin, .idx, PREFIX_00001... One sequence
of an IndexedDataset is one unit; its document index marks documents. `.idx`, little-endian: `MMIDIDX\\0\\0`, version
u64, dtype code u8, U u64, D + 1 u64, lengths i32 [U], byte offsets i64 [U], document index i64 [D + 1]. U units,
D documents, T tokens. `.crc` holds checksums of the blocks of `.bin` (`data.blocks`). Written by `preprocess.assembly`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.command_line import is_first_on_machine
from metro_megatron.data.blocks import CHECKSUM_BYTES, num_blocks
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.file_hashes import damaged_files
from metro_megatron.data.manifest import (
    REMEDY,
    DatasetPaths,
    FileEntry,
    Manifest,
    ShardEntry,
    ShardPaths,
    other_tokenizer,
    read_manifest,
)
from metro_megatron.data.mapping import mapped
from metro_megatron.errors import UserError
from metro_megatron.vocabulary import SpecialIds

INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPE_CODES: dict[str, int] = {"int32": 4, "uint16": 8}
"""megatron-core's numbers for the dtypes used here."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where ids fit (megatron-core's rule: below 65,500), int32 otherwise."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True, kw_only=True)
class Shard(TokenizedDocuments):
    """A finished shard, memory-mapped: its documents, ids in uint16 or int32, and where they come from."""

    prefix: str
    """The shard's own, PREFIX_00000."""
    number: int
    """In the dataset, from 0."""
    manifest: Manifest
    """The dataset's."""

    @classmethod
    def open_all(cls, prefix: str) -> "list[Shard]":
        """All shards of a dataset, in order. Of what is not read by blocks, indices and the tokenizer, one process of a
        machine compares the hashes.

        Raises UserError if the manifest is missing or unreadable, a size or such a hash is not the manifest's, an index
        speaks of other tokens than `.bin` holds, or there is no document.
        """
        manifest, paths = read_manifest(prefix), DatasetPaths(prefix)
        files = [paths.shard(number) for number in range(len(manifest.shards))]
        if not manifest.shards:
            raise UserError(f"{prefix}: holds no documents; merge it with other parts (tools/merge_shards.py)")
        shards: list[Shard] = []
        problems: list[str] = []
        first = 0
        for number, entry in enumerate(manifest.shards):
            try:
                shards.append(cls._open(files[number], manifest, number, prefix, first))
            except UserError as error:
                problems += error.problems
            first += entry.documents
        if not problems and is_first_on_machine():
            problems += damaged_files(_hashed_files(paths.tokenizer, files, manifest), REMEDY)
        if problems:
            raise UserError(problems)
        return shards

    @classmethod
    def _open(cls, paths: ShardPaths, manifest: Manifest, number: int, dataset: str, first_document: int) -> "Shard":
        entry = manifest.shards[number]
        dtype = token_dtype(manifest.vocab_size)
        content = _whole(paths.bin, entry.bin.bytes)
        unit_lengths, document_index = _read_index(paths.idx, dtype, entry)
        if len(content) != entry.tokens * dtype.itemsize:
            raise UserError(
                f"{paths.bin}: {len(content):,} bytes, but its index counts {entry.tokens:,} {dtype} tokens; {REMEDY}"
            )
        return cls(
            tokens=content.view(dtype),
            unit_lengths=unit_lengths,
            document_index=document_index,
            dataset=dataset,
            first_document=first_document,
            checksums=_checksums(paths.crc, entry),
            prefix=paths.prefix,
            number=number,
            manifest=manifest,
        )

    def documents_of(self, tokens: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For tokens [n] of the shard, by their places: the number in the dataset of the document that each is in, and
        how many tokens of that document come before it. Looked up in the index on the disk, for a few."""
        itemsize = self.tokens.dtype.itemsize
        index, num_units = mapped(ShardPaths(self.prefix).idx, np.dtype(np.uint8)), len(self.unit_lengths)
        starts = index[INDEX_HEADER.size + 4 * num_units : INDEX_HEADER.size + 12 * num_units].view("<i8")
        # Empty units and documents begin where the next one does: the last that begins there has the token.
        units = np.searchsorted(starts, np.asarray(tokens, np.int64) * itemsize, side="right") - 1
        documents = np.searchsorted(self.document_index, units, side="right") - 1
        before = tokens - starts[self.document_index[documents]] // itemsize
        return documents + self.first_document, before

    @property
    def name(self) -> str:
        return str(ShardPaths(self.prefix).bin)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer folder these ids come from."""
        return DatasetPaths(self.dataset).tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, specials included."""
        return self.manifest.vocab_size

    @property
    def special_ids(self) -> SpecialIds:
        """The tokenizer's ids that are no words."""
        return self.manifest.special_ids

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the file that the tokenizer's ids come from."""
        return self.manifest.tokenizer_sha256

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids, `.bin`, as the manifest says."""
        return self.manifest.shards[self.number].bin.sha256

    @property
    def index_sha256(self) -> str:
        """SHA-256 of units and documents, `.idx`, as the manifest says."""
        return self.manifest.shards[self.number].idx.sha256


def open_shards(prefixes: Sequence[str]) -> list[Shard]:
    """All shards of all datasets, in order of prefix and number.

    Raises one UserError for all that is wrong with them, different tokenizers included.
    """
    datasets: list[list[Shard]] = []
    problems = [] if prefixes else ["no shards given; name prefixes written by tools/preprocess_data.py"]
    for prefix in prefixes:
        try:
            datasets.append(Shard.open_all(prefix))
        except UserError as error:
            problems += error.problems
    for shard, *_ in datasets[1:]:
        first = datasets[0][0]
        if problem := other_tokenizer(shard.dataset, shard.manifest, first.dataset, first.manifest):
            problems.append(problem)
    if problems:
        raise UserError(problems)
    return [shard for shards in datasets for shard in shards]


def _hashed_files(tokenizer: Path, files: Sequence[ShardPaths], manifest: Manifest) -> dict[Path, FileEntry]:
    """The files of a dataset that are not read by blocks, as the manifest says that they are."""
    hashed = {tokenizer / name: entry for name, entry in (manifest.tokenizer_files or {}).items()}
    for paths, shard in zip(files, manifest.shards, strict=True):
        hashed[paths.idx] = shard.idx
        if shard.crc:
            hashed[paths.crc] = shard.crc
    return hashed


def _whole(path: Path, expected: int) -> NDArray[np.uint8]:
    """The bytes of a file, mapped. Raises UserError if it cannot be read or has another size than the manifest says."""
    try:
        content = mapped(path, np.dtype(np.uint8))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    if len(content) != expected:
        raise UserError(f"{path}: {len(content):,} bytes, its manifest says {expected:,}: damaged; {REMEDY}")
    return content


def _checksums(path: Path, entry: ShardEntry) -> NDArray[np.uint32] | None:
    if entry.crc is None:
        return None
    content = _whole(path, entry.crc.bytes)
    if len(content) != CHECKSUM_BYTES * num_blocks(entry.bin.bytes):
        raise UserError(f"{path}: {len(content):,} bytes, not {CHECKSUM_BYTES} for each block; {REMEDY}")
    return content.view("<u4")


def _read_index(path: Path, dtype: np.dtype[Any], entry: ShardEntry) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Unit lengths and document index; the ends of the arrays are checked, not their middles."""
    documents, units, tokens = entry.documents, entry.units, entry.tokens
    damaged = UserError(f"{path}: damaged (contradicts its manifest); {REMEDY}")
    content = _whole(path, entry.idx.bytes)
    expected = (INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype.name], units, documents + 1)
    if len(content) < INDEX_HEADER.size or INDEX_HEADER.unpack(content[: INDEX_HEADER.size].data) != expected:
        raise damaged
    if len(content) != INDEX_HEADER.size + 12 * units + 8 * (documents + 1) or units < 1:
        raise damaged
    content = content[INDEX_HEADER.size :]
    lengths = content[: 4 * units].view("<i4")
    offsets = content[4 * units : 12 * units].view("<i8")
    document_index = content[12 * units :].view("<i8")
    if offsets[0] != 0 or offsets[-1] + int(lengths[-1]) * dtype.itemsize != tokens * dtype.itemsize:
        raise damaged
    if document_index[0] != 0 or document_index[-1] != units:
        raise damaged
    return lengths, document_index
