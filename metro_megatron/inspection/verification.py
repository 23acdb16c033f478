"""Whether a dataset is what its manifest says, read from the first byte to the last in bounded memory.

Beside it, if they are there: the journal of a run that works at its prefix, the hashes that a merge waits for, and the
sample indices, the counts of ids and the cache of replacements of its folder.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metro_megatron.cli.command_line import describe_os_error
from metro_megatron.data.file_hashes import damaged_files
from metro_megatron.data.index_files import index_folder_problems
from metro_megatron.data.manifest import (
    NO_DOCUMENTS,
    REMEDY,
    DatasetPaths,
    FileEntry,
    Manifest,
    Statistics,
    read_manifest,
)
from metro_megatron.data.replacements import DEFAULT_FOLDER, CacheFolder
from metro_megatron.data.samples import cache_folder
from metro_megatron.data.shards import token_dtype
from metro_megatron.data.token_counts import token_count_problems
from metro_megatron.errors import UserError
from metro_megatron.files import opened
from metro_megatron.inspection.completeness import missing_inputs
from metro_megatron.inspection.index_check import index_problems
from metro_megatron.preprocess.journal import Journal
from metro_megatron.preprocess.merging import hashes_problems
from metro_megatron.preprocess.parts import source_blocks
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.vocabulary import SpecialIds

_COUNTS = ("documents", "units", "tokens")
_BLOCK_BYTES = 4 << 20

OnRead = Callable[[int], object]
"""Called with the bytes of every block that was read."""


@dataclass(frozen=True)
class Verified:
    """What was found to be as it should."""

    manifest: Manifest
    num_files: int
    num_bytes: int


def verify(prefix: str, on_read: OnRead = lambda size: None) -> Verified:
    """Compare all of a dataset with its manifest: sizes, SHA-256, indices, ids, counts, tokenizer and inputs read.

    Raises one UserError for all that is wrong.
    """
    manifest = read_manifest(prefix)
    problems = [*_totals(prefix, manifest), *_tokenizer(prefix, manifest), *missing_inputs(prefix, manifest)]
    for number in range(len(manifest.shards)):
        problems += _shard(prefix, manifest, number, on_read)
    beyond = DatasetPaths(prefix).shard(len(manifest.shards))
    problems += [f"{path}: the manifest does not know it; remove it" for path in beyond.files if path.exists()]
    problems += [*Journal(DatasetPaths(prefix).work).problems(), *hashes_problems(prefix, manifest)]
    beside = cache_folder("", [prefix])
    problems += [*index_folder_problems(beside), *token_count_problems(beside)]
    problems += CacheFolder(Path(prefix).parent / DEFAULT_FOLDER).problems()
    if not problems:
        problems += _recount(prefix, manifest)
    if problems:
        raise UserError(problems)
    sizes = _file_sizes(prefix, manifest)
    return Verified(manifest, len(sizes), sum(sizes))


def dataset_bytes(manifest: Manifest) -> int:
    """Bytes of all shards, as the manifest says."""
    return sum(_file_sizes("", manifest))


def _file_sizes(prefix: str, manifest: Manifest) -> list[int]:
    paths = DatasetPaths(prefix)
    by_shard = (paths.shard(number).with_entries(entry) for number, entry in enumerate(manifest.shards))
    return [entry.bytes for files in by_shard for entry in files.values()]


def _totals(prefix: str, manifest: Manifest) -> Iterator[str]:
    """Whether counts add up over shards and over sources."""
    path = DatasetPaths(prefix).manifest
    for number, source in enumerate(manifest.sources):
        totals = source.document_lengths.total, source.unit_lengths.total
        if totals != (source.documents, source.units):
            yield (
                f"{path}: source {number} counts {source.documents:,} documents and {source.units:,} units, "
                f"its histograms {totals[0]:,} and {totals[1]:,}; {REMEDY}"
            )
    for name in _COUNTS:
        for kind in ("shards", "sources"):
            total = sum(getattr(entry, name) for entry in getattr(manifest, kind))
            if total != getattr(manifest, name):
                yield f"{path}: {getattr(manifest, name):,} {name}, but its {kind} add up to {total:,}; {REMEDY}"


def _tokenizer(prefix: str, manifest: Manifest) -> Iterator[str]:
    folder = DatasetPaths(prefix).tokenizer
    files = {folder / name: entry for name, entry in (manifest.tokenizer_files or {}).items()}
    if damaged := list(damaged_files(files, REMEDY)):
        yield from damaged
        return
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except UserError as error:
        yield from error.problems
        return
    for name, found, expected in (
        ("sha256", tokenizer.sha256, manifest.tokenizer_sha256),
        ("vocab_size", tokenizer.vocab_size, manifest.vocab_size),
        ("special_ids", tokenizer.special_ids, manifest.special_ids),
    ):
        if found != expected:
            yield (
                f"{folder}: {name} {found}, the manifest says {expected}: "
                "not the tokenizer of these shards; copy that one there"
            )


def _shard(prefix: str, manifest: Manifest, number: int, on_read: OnRead) -> Iterator[str]:
    paths = DatasetPaths(prefix).shard(number)
    dtype = token_dtype(manifest.vocab_size)
    entry = manifest.shards[number]
    ids = _IdCheck(manifest.vocab_size, manifest.special_ids, dtype)

    def on_ids(block: memoryview) -> None:
        ids.add(block)
        on_read(len(block))

    try:
        yield from _content(manifest, number, "bin", paths.bin, on_ids)
        yield from ids.problems(paths.bin)
    except OSError as error:
        yield f"{describe_os_error(error)}; {REMEDY}"
    try:
        yield from _content(manifest, number, "idx", paths.idx, lambda block: on_read(len(block)))
        yield from index_problems(paths.idx, dtype, entry)
    except OSError as error:
        yield f"{describe_os_error(error)}; {REMEDY}"
    if entry.crc:
        yield from damaged_files({paths.crc: entry.crc}, REMEDY)
        on_read(entry.crc.bytes)
    if entry.bin.bytes != entry.tokens * dtype.itemsize:
        yield (
            f"{DatasetPaths(prefix).manifest}: {paths.bin.name} has {entry.bin.bytes:,} bytes, which are not "
            f"{entry.tokens:,} {dtype} tokens; {REMEDY}"
        )


def _content(
    manifest: Manifest,
    number: int,
    name: Literal["bin", "idx"],
    path: Path,
    on_block: Callable[[memoryview], object],
) -> Iterator[str]:
    """Read a file once; compare its size and SHA-256 with the manifest's."""
    entry: FileEntry = getattr(manifest.shards[number], name)
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with opened(path) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            on_block(buffer[:read])
            size += read
    found, expected = digest.hexdigest(), entry.sha256
    if found == expected and size == entry.bytes:
        return
    others = [shard.name for shard in manifest.shards if getattr(shard, name).sha256 == found]
    hint = f": the content of shard {others[0]}, files are swapped" if others else ""
    if size != entry.bytes:
        yield f"{path}: {size:,} bytes, the manifest says {entry.bytes:,}{hint}; {REMEDY}"
    else:
        yield f"{path}: SHA-256 {found}, the manifest says {expected}{hint}; {REMEDY}"


class _IdCheck:
    """Ids of a stream, given in blocks: which are none of the vocabulary's, or specials."""

    def __init__(self, vocab_size: int, special_ids: SpecialIds, dtype: np.dtype[Any]):
        self._vocab_size, self._dtype = vocab_size, dtype.newbyteorder("<")
        self._in_no_text = special_ids.reserved
        self._seen = self._wrong = 0
        self._example = ""

    def add(self, block: memoryview) -> None:
        count = len(block) // self._dtype.itemsize
        ids = np.frombuffer(block, self._dtype, count)
        wrong = np.flatnonzero(np.isin(ids, self._in_no_text) | (ids < 0) | (ids >= self._vocab_size))
        if len(wrong):
            if not self._wrong:
                self._example = f"{ids[wrong[0]]} at token {self._seen + int(wrong[0]):,}"
            self._wrong += len(wrong)
        self._seen += count

    def problems(self, path: Path) -> Iterator[str]:
        if self._wrong:
            yield (
                f"{path}: {self._wrong:,} ids that no text of {self._vocab_size:,} ids has, the first is "
                f"{self._example}; {REMEDY}"
            )


def _recount(prefix: str, manifest: Manifest) -> Iterator[str]:
    """Whether every source has the counts and histograms of its documents in the shards."""
    counted = [NO_DOCUMENTS for _ in manifest.sources]
    for number, block in source_blocks(prefix, manifest):
        counted[number] += Statistics.of(np.diff(block.token_starts), block.unit_lengths)
    for number, (source, statistics) in enumerate(zip(manifest.sources, counted, strict=True)):
        names = [field.name for field in fields(Statistics)]
        wrong = [name for name in names if getattr(source, name) != getattr(statistics, name)]
        if wrong:
            found = ", ".join(f"{name} {getattr(statistics, name):,}" for name in _COUNTS)
            yield (
                f"{DatasetPaths(prefix).manifest}: source {number} ({source.name}): {', '.join(wrong)} are not "
                f"those of its documents in the shards ({found}); {REMEDY}"
            )
