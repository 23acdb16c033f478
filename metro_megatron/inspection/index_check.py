"""Whether a shard's `.idx` is well formed, read in blocks from the first unit to the last document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.manifest import REMEDY, ShardEntry
from metro_megatron.data.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION
from metro_megatron.files import opened
from metro_megatron.preprocess.parts import Section

_BLOCK_ENTRIES = 1 << 19


def index_problems(path: Path, dtype: np.dtype[Any], entry: ShardEntry) -> Iterator[str]:
    """What is wrong with an index: its shape, or other units, documents and tokens than the manifest's entry counts.

    A size that is not the entry's is no problem here: whoever compares hashes has found it.
    """
    size = path.stat().st_size
    if size != entry.idx.bytes:
        return
    with opened(path) as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size:
        yield f"{path}: {size:,} bytes, less than the header of an index; {REMEDY}"
        return
    *kind, units, boundaries = INDEX_HEADER.unpack(header)
    if kind != [INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype.name]]:
        yield f"{path}: not the header of an index of {dtype} ids; {REMEDY}"
        return
    if (units, boundaries) != (entry.units, entry.documents + 1) or units < 1:
        yield (
            f"{path}: {units:,} units of {boundaries - 1:,} documents, the manifest says {entry.units:,} of "
            f"{entry.documents:,}; {REMEDY}"
        )
        return
    if size != INDEX_HEADER.size + 12 * units + 8 * boundaries:
        yield f"{path}: {size:,} bytes, not those of {units:,} units of {boundaries - 1:,} documents; {REMEDY}"
        return
    yield from _units(path, units, dtype.itemsize, entry.tokens)
    yield from _documents(path, units, boundaries)


def _units(path: Path, units: int, itemsize: int, tokens: int) -> Iterator[str]:
    lengths = Section(path, np.dtype("<i4"), INDEX_HEADER.size)
    offsets = Section(path, np.dtype("<i8"), INDEX_HEADER.size + 4 * units)
    total = 0
    for begin in range(0, units, _BLOCK_ENTRIES):
        end = min(units, begin + _BLOCK_ENTRIES)
        some = lengths.read(begin, end).astype(np.int64)
        found = offsets.read(begin, end)
        ends = total + np.cumsum(some)
        if (wrong := _first(some < 1)) is not None:
            yield f"{path}: unit {begin + wrong:,} has length {some[wrong]:,}, must be positive; {REMEDY}"
            return
        expected = (ends - some) * itemsize
        if (wrong := _first(found != expected)) is not None:
            yield (
                f"{path}: unit {begin + wrong:,} begins at byte {found[wrong]:,}, must at {expected[wrong]:,}, "
                f"where the one before ends; {REMEDY}"
            )
            return
        total = int(ends[-1])
    if total != tokens:
        yield f"{path}: its units have {total:,} tokens, the manifest says {tokens:,}; {REMEDY}"


def _documents(path: Path, units: int, boundaries: int) -> Iterator[str]:
    section = Section(path, np.dtype("<i8"), INDEX_HEADER.size + 12 * units)
    before = -1
    for begin in range(0, boundaries, _BLOCK_ENTRIES):
        some = section.read(begin, min(boundaries, begin + _BLOCK_ENTRIES))
        if begin == 0 and some[0] != 0:
            yield f"{path}: the first document begins at unit {some[0]:,}, must at 0; {REMEDY}"
            return
        if (wrong := _first(np.diff(some, prepend=before) < 1)) is not None:
            document = begin + wrong - 1
            yield f"{path}: document {document:,} ends at unit {some[wrong]:,}, must after it has begun; {REMEDY}"
            return
        before = int(some[-1])
    if before != units:
        yield f"{path}: the last document ends at unit {before:,} of {units:,}, must at the last; {REMEDY}"


def _first(flags: NDArray[np.bool_]) -> int | None:
    return int(flags.argmax()) if flags.any() else None
