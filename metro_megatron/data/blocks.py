"""Checksums of the blocks of a shard's ids: damage is named when a block is first read, not trained on.

PREFIX_00000.crc holds the CRC-32 (zlib's) of every BLOCK_BYTES of PREFIX_00000.bin as u32, little-endian; the last
block may be shorter. Small blocks, as samples come in random order: a page that is read of a mapped file brings its
neighbours along, so that a block costs the disk hardly more than the sample in it.
"""

from collections.abc import Sequence

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.manifest import REMEDY
from metro_megatron.errors import UserError

BLOCK_BYTES, CHECKSUM_BYTES = 1 << 14, 4

_SHOWN = 5


class BlockSums:
    """The checksums of a stream of bytes that comes in pieces of any size."""

    def __init__(self) -> None:
        self._finished: list[int] = []
        self._crc, self._bytes = 0, 0
        """Of the block that is not full."""

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        begin = 0
        while begin < len(data):
            piece = data[begin : begin + BLOCK_BYTES - self._bytes]
            self._crc, self._bytes = crc32(piece, self._crc), self._bytes + len(piece)
            begin += len(piece)
            if self._bytes == BLOCK_BYTES:
                self._finished.append(self._crc)
                self._crc = self._bytes = 0

    def array(self) -> NDArray[np.uint32]:
        """Checksums of all blocks so far, that of a last one that is not full included."""
        return np.array([*self._finished, self._crc][: len(self._finished) + bool(self._bytes)], "<u4")


def num_blocks(num_bytes: int) -> int:
    """Of a file of this size."""
    return -(-num_bytes // BLOCK_BYTES)


def describe_damage(name: str, block: int, size: int, found: int, expected: int) -> str:
    """A line about a block of a file, whose checksum was `expected` when it was written."""
    begin = block * BLOCK_BYTES
    return (
        f"{name}: block {block:,} (bytes {begin:,} to {begin + size:,}) is damaged: CRC-32 {found:08x}, was "
        f"{expected:08x} when written; {REMEDY}"
    )


class TokenStreams:
    """The token streams of shards, whose blocks are compared with their checksums once, when they are first needed.

    Blocks of all shards are numbered one after another. Where a shard has no checksums, nothing is compared.
    """

    def __init__(self, shards: Sequence[TokenizedDocuments]):
        self._shards = shards
        self.arrays = [np.asarray(shard.tokens) for shard in shards]
        """[T] ids of each shard, as they are: `check` those that are read."""
        counts = [num_blocks(array.nbytes) for array in self.arrays]
        self._item_bytes = np.array([array.itemsize for array in self.arrays], np.int64)
        self._first_blocks = np.cumsum([0, *counts], dtype=np.int64)
        self._is_pending = np.repeat([shard.checksums is not None for shard in shards], counts)
        self._num_pending = int(self._is_pending.sum())

    def check(self, shard: NDArray[np.integer], start: NDArray[np.integer], length: NDArray[np.integer]) -> None:
        """Compare the blocks that hold these slices [n] of shards' tokens, each of a token at least.

        Raises UserError naming shard, block and bytes of what is damaged.
        """
        if not self._num_pending:
            return
        begin = start.astype(np.int64) * self._item_bytes[shard]
        first = begin // BLOCK_BYTES
        last = (begin + length * self._item_bytes[shard] - 1) // BLOCK_BYTES
        before = self._first_blocks[shard]
        steps = range(int((last - first).max(initial=0)) + 1)
        blocks = np.concatenate([before + np.minimum(first + step, last) for step in steps])
        blocks = np.unique(blocks[self._is_pending[blocks]])
        numbers = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        problems: list[str] = []
        for number in np.unique(numbers).tolist():
            problems += self._damages(number, blocks[numbers == number] - self._first_blocks[number])
        if problems:
            more = [f"{len(problems):,} blocks are damaged in all"] if len(problems) > _SHOWN else []
            raise UserError(problems[:_SHOWN] + more)
        self._is_pending[blocks] = False
        self._num_pending -= len(blocks)

    def _damages(self, number: int, blocks: NDArray[np.int64]) -> list[str]:
        """What is wrong with blocks [n] of shard `number`."""
        shard, content = self._shards[number], self.arrays[number].data.cast("B")
        assert shard.checksums is not None
        # As little Python as can be: each token of a corpus passes here once.
        found = [crc32(content[begin : begin + BLOCK_BYTES]) for begin in (blocks * BLOCK_BYTES).tolist()]
        expected = shard.checksums[blocks].tolist()
        if found == expected:
            return []
        sizes = np.minimum(BLOCK_BYTES, len(content) - blocks * BLOCK_BYTES).tolist()
        each = zip(blocks.tolist(), sizes, found, expected, strict=True)
        return [describe_damage(shard.name, *one) for one in each if one[2] != one[3]]
