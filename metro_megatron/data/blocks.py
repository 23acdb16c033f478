"""Checksums of the blocks of a shard's ids: damage is named when a block is first read, not trained on.

PREFIX_00000.crc holds the CRC-32 (zlib's) of every BLOCK_BYTES of PREFIX_00000.bin as u32, little-endian; the last
block may be shorter. Small blocks, as samples come in random order: a page that is read of a mapped file brings its
neighbours along, so that a block costs the disk hardly more than the sample in it.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.errors import UserError

BLOCK_BYTES, CHECKSUM_BYTES = 1 << 14, 4
REMEDY = "copy the shard again from where it is whole, or write it again with tools/preprocess_data.py"

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
            self._crc, self._bytes = zlib.crc32(piece, self._crc), self._bytes + len(piece)
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


def damage_of_block(name: str, block: int, content: memoryview, expected: int) -> str | None:
    """What is wrong with the content of a file's block, whose checksum was `expected`; None if it is whole."""
    found, begin = zlib.crc32(content), block * BLOCK_BYTES
    if found == expected:
        return None
    return (
        f"{name}: block {block:,} (bytes {begin:,} to {begin + len(content):,}) is damaged: CRC-32 {found:08x}, was "
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
        blocks = np.unique(np.concatenate([before + np.minimum(first + step, last) for step in steps]))
        blocks = blocks[self._is_pending[blocks]]
        numbers = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        inside = blocks - self._first_blocks[numbers]
        problems = [*filter(None, map(self._damage, numbers.tolist(), inside.tolist()))]
        if problems:
            more = [f"{len(problems):,} blocks are damaged in all"] if len(problems) > _SHOWN else []
            raise UserError(problems[:_SHOWN] + more)
        self._is_pending[blocks] = False
        self._num_pending -= len(blocks)

    def _damage(self, number: int, block: int) -> str | None:
        """What is wrong with a block of shard `number`; None if it is whole."""
        shard, begin = self._shards[number], block * BLOCK_BYTES
        assert shard.checksums is not None
        content = memoryview(self.arrays[number]).cast("B")[begin : begin + BLOCK_BYTES]
        return damage_of_block(shard.name, block, content, int(shard.checksums[block]))
