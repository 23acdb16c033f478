"""Writing one shard, streamed in bounded memory, under temporary names until all of it is on the disk."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, ShardPaths
from metro_megatron.files import whole_files

_BLOCK = 1 << 20


class ShardWriter:
    """Appends documents, then `finish`es; made by `shard_writer`."""

    def __init__(self, files: list[BinaryIO], dtype: np.dtype[Any]):
        self._bin, self._idx, self._lengths, self._documents = map(_HashedFile, files)
        self._dtype = dtype
        self.documents = self.units = self.tokens = 0
        self._documents.write(np.zeros(1, "<i8"))

    def append(
        self,
        token_blocks: Iterable[NDArray[np.integer]],
        unit_lengths: NDArray[np.int32],
        document_units: NDArray[np.int64],
    ) -> None:
        """Append whole documents: their ids in any number of pieces, tokens per unit [U], units per document [D]."""
        assert int(document_units.sum()) == len(unit_lengths)
        written = 0
        for tokens in token_blocks:
            self._bin.write(tokens.astype(self._dtype.newbyteorder("<"), copy=False))
            written += len(tokens)
        assert int(unit_lengths.sum(dtype=np.int64)) == written
        self._lengths.write(unit_lengths.astype("<i4", copy=False))
        self._documents.write((self.units + np.cumsum(document_units)).astype("<i8", copy=False))
        self.documents += len(document_units)
        self.units += len(unit_lengths)
        self.tokens += written

    def finish(self) -> dict[str, Any]:
        """Write the index; returns counts, sizes and hashes as the manifest holds them."""
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
        return {
            "documents": self.documents,
            "units": self.units,
            "tokens": self.tokens,
            "bin": self._bin.summary(),
            "idx": self._idx.summary(),
        }


@contextmanager
def shard_writer(prefix: str, dtype: np.dtype[Any]) -> Iterator[ShardWriter]:
    """A writer of `prefix`.bin and .idx, which appear when the block ends; nothing stays if it raises."""
    paths = ShardPaths(prefix)
    lengths, documents = (Path(f"{prefix}.{name}.scratch") for name in ("lengths", "documents"))
    try:
        with whole_files([paths.bin, paths.idx, lengths, documents]) as files:
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
        while data := self._file.read(_BLOCK):
            yield np.frombuffer(data, dtype)
        assert self._file.tell() == self._bytes

    def summary(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}
