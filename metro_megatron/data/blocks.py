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

BLOCK_BYTES, CHECKSUM_BYTES = 1 << 15, 4
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


def damaged_block(path: str, number: int, content: NDArray[np.uint8], expected: int) -> str | None:
    """What is wrong with block `number` of a file, whose bytes are `content`; None if it is whole."""
    found = zlib.crc32(content)
    if found == expected:
        return None
    begin = number * BLOCK_BYTES
    return (
        f"{path}: block {number:,} (bytes {begin:,} to {begin + len(content):,}) is damaged: CRC-32 {found:08x}, "
        f"was {expected:08x} when written; {REMEDY}"
    )


class TokenStreams:
    """The token streams of shards; their blocks are compared with their checksums once, when they are first needed.

    Blocks of all shards are numbered one after another. Where a shard has no checksums, nothing is compared.
    """

    def __init__(self, shards: Sequence[TokenizedDocuments]):
        self._streams = [np.asarray(shard.tokens) for shard in shards]
        self._shards = shards
        counts = [num_blocks(stream.nbytes) for stream in self._streams]
        self._first_blocks = np.cumsum([0, *counts], dtype=np.int64)
        self._item_bytes = np.array([stream.itemsize for stream in self._streams], np.int64)
        self._is_pending = np.ones(self._first_blocks[-1], np.bool_)
        for number, shard in enumerate(shards):
            if shard.checksums is None:
                self._is_pending[self._first_blocks[number] : self._first_blocks[number + 1]] = False
        self._has_checks = bool(self._is_pending.any())

    def __getitem__(self, shard: int) -> NDArray[np.integer]:
        """[T] ids of a shard, as they are; `check` those that are read."""
        return self._streams[shard]

    def check(self, shard: NDArray[np.integer], start: NDArray[np.integer], length: NDArray[np.integer]) -> None:
        """Compare the blocks that hold these slices [n] of shards' tokens, each of a token at least.

        Raises UserError naming shard, block and bytes of what is damaged.
        """
        if not self._has_checks or not len(shard):
            return
        begin = start.astype(np.int64) * self._item_bytes[shard]
        first = begin // BLOCK_BYTES
        last = (begin + length * self._item_bytes[shard] - 1) // BLOCK_BYTES
        before = self._first_blocks[shard]
        pending: set[int] = set()
        for step in range(int((last - first).max()) + 1):
            blocks = before + np.minimum(first + step, last)
            pending.update(blocks[self._is_pending[blocks]].tolist())
        problems = [problem for block in sorted(pending) if (problem := self._compare(block))]
        if problems:
            more = [f"{len(problems)} blocks are damaged in all"] if len(problems) > _SHOWN else []
            raise UserError(problems[:_SHOWN] + more)

    def _compare(self, block: int) -> str | None:
        number = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        inside = block - int(self._first_blocks[number])
        shard, stream = self._shards[number], self._streams[number]
        assert shard.checksums is not None
        content = stream.view(np.uint8)[inside * BLOCK_BYTES : (inside + 1) * BLOCK_BYTES]
        problem = damaged_block(shard.name, inside, content, int(shard.checksums[inside]))
        self._is_pending[block] = problem is not None
        return problem
