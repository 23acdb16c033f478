"""What rows of padding cost on the documents of a source, and what packed rows do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.packing import pack_prefix
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleRule, sample_blocks
from metro_megatron.data.shards import Shard
from metro_megatron.data.statistics import padding_waste

SEQ_LENGTHS = (128, 512)
PACKED_ROW = 16384
_PACKED_ROWS = 64
"""About a million tokens, one step of the paper's."""

_BLOCK_DOCUMENTS = 4096
_MAX_DOCUMENTS = 200_000


@dataclass(frozen=True)
class Waste:
    """Shares of a step that are padding, by the longest sample in tokens."""

    padded: dict[int, float]
    """Every sample in a row of its own."""
    packed: dict[int, float]
    """Samples side by side in rows of PACKED_ROW."""


@dataclass(frozen=True)
class _Documents:
    """Consecutive documents of a shard, as samples are cut from them."""

    unit_lengths: NDArray[np.integer]
    document_index: NDArray[np.integer]
    tokens: NDArray[np.integer]
    dataset: str
    first_document: int


def measure_waste(shards: Sequence[Shard]) -> list[Waste | None]:
    """For every source of a dataset, in the manifest's order; None for one without documents.

    Of more than 200,000 documents of a source, evenly spread blocks are measured. Packed rows are those of one
    step of a million tokens.
    """
    found: list[Waste | None] = []
    first = 0
    for source in shards[0].manifest["sources"]:
        last = first + source["documents"]
        found.append(_waste(shards, first, last) if last > first else None)
        first = last
    return found


def _waste(shards: Sequence[Shard], first: int, last: int) -> Waste:
    every = -(-(last - first) // _MAX_DOCUMENTS)
    blocks = list(_blocks(shards, first, last))[::every]
    padded: dict[int, float] = {}
    packed: dict[int, float] = {}
    for seq_length in SEQ_LENGTHS:
        found = [block.length for block in sample_blocks(blocks, SampleRule(seq_length))]
        lengths = np.concatenate(found) + NUM_SAMPLE_SPECIALS
        padded[seq_length] = padding_waste(lengths, seq_length)
        packed[seq_length] = _packed_waste(lengths)
    return Waste(padded, packed)


def _packed_waste(lengths: NDArray[np.integer]) -> float:
    room = _PACKED_ROWS * PACKED_ROW
    drawn = np.random.default_rng(0).choice(lengths, 1 + 2 * room // int(lengths.mean()))
    rows = pack_prefix(drawn, PACKED_ROW, _PACKED_ROWS)
    return 1.0 - float(drawn[np.concatenate(rows)].sum(dtype=np.int64)) / room


def _blocks(shards: Sequence[Shard], first: int, last: int) -> Iterator[Any]:
    """Documents first to last of the dataset."""
    for shard in shards:
        begin = max(first, shard.first_document) - shard.first_document
        end = min(last - shard.first_document, len(shard.document_index) - 1)
        for at in range(begin, end, _BLOCK_DOCUMENTS):
            index = shard.document_index[at : min(end, at + _BLOCK_DOCUMENTS) + 1]
            yield _Documents(shard.unit_lengths, index, shard.tokens, shard.dataset, shard.first_document + at)
