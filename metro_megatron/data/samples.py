"""Samples: whole consecutive units of one document, joined up to the longest sample (fairseq's complete_doc).

A sample is a slice of one shard's token stream. U units, D documents, n samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.randomness import Purpose, uniform

Split = Literal["train", "validation", "all"]

NUM_SAMPLE_SPECIALS = 2
"""<s> before and </s> after the content of every sample."""


class UnitShard(Protocol):
    """What samples need of a shard; metro_megatron.data.shards.Shard has it."""

    @property
    def unit_lengths(self) -> NDArray[np.integer]:
        """[U] tokens of each unit, in the order of the token stream."""

    @property
    def document_index(self) -> NDArray[np.integer]:
        """[D + 1] document d is units document_index[d] to document_index[d + 1]."""

    @property
    def tokens(self) -> NDArray[np.integer]:
        """[T] the token stream."""


@dataclass(frozen=True)
class SampleIndex:
    """Where the content of every sample lies. Sample ids are places in these arrays, by shard and offset."""

    shard: NDArray[np.int16]
    """[n] shard number."""
    start: NDArray[np.int64]
    """[n] first token in the shard's token stream."""
    length: NDArray[np.int32]
    """[n] content tokens, 1 to seq_length - 2."""
    seq_length: int
    """Longest sample in tokens, <s> and </s> included."""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, <s> and </s> included."""
        return int(self.length.sum(dtype=np.int64)) + NUM_SAMPLE_SPECIALS * len(self)


def build_sample_index(
    shards: Sequence[UnitShard], seq_length: int, split: Split = "all", validation_fraction: float = 0.0
) -> SampleIndex:
    """Samples of the documents of one split, greedily filled with whole units up to seq_length - 2 tokens.

    Documents are never joined. A unit longer than seq_length - 2 counts as several units, cut every
    seq_length - 2 tokens. A document is held out ("validation") if a hash of its shard's place in the list
    and its own number in the shard lies below validation_fraction; the seed of the run plays no part, so all
    runs hold out the same.

    Raises UserError when seq_length has no room for content or the split has no samples.
    """
    if seq_length <= NUM_SAMPLE_SPECIALS:
        raise UserError(f"data.seq_length is {seq_length}; it must be at least 3: <s>, one token and </s>")
    assert len(shards) < np.iinfo(np.int16).max, len(shards)
    parts = [
        _shard_samples(shard, _documents_of_split(number, shard, split, validation_fraction), seq_length - 2)
        for number, shard in enumerate(shards)
    ]
    index = SampleIndex(
        shard=np.repeat(np.arange(len(parts), dtype=np.int16), [len(start) for start, _ in parts]),
        start=np.concatenate([np.empty(0, np.int64), *(start for start, _ in parts)]),
        length=np.concatenate([np.empty(0, np.int32), *(length for _, length in parts)]),
        seq_length=seq_length,
    )
    if len(index) == 0:
        raise UserError(_no_samples(shards, split, validation_fraction))
    return index


def _documents_of_split(
    shard_number: int, shard: UnitShard, split: Split, validation_fraction: float
) -> NDArray[np.int64]:
    documents = np.arange(len(shard.document_index) - 1)
    if split == "all":
        return documents
    is_held_out = uniform(Purpose.SPLIT, shard_number, documents) < validation_fraction
    return documents[is_held_out if split == "validation" else ~is_held_out]


def _shard_samples(
    shard: UnitShard, documents: NDArray[np.int64], max_content: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of the samples of these documents, ascending.

    All documents advance together, one sample at a time, so the number of array operations is the number of
    samples of the longest document.
    """
    unit_ends, document_index = _split_long_units(shard, max_content)
    unit, last = document_index[documents], document_index[documents + 1]
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    while unit.size:
        following = np.searchsorted(unit_ends, unit_ends[unit] + max_content, side="right") - 1
        following = np.minimum(following, last)
        starts.append(unit_ends[unit])
        ends.append(unit_ends[following])
        is_unfinished = following < last
        unit, last = following[is_unfinished], last[is_unfinished]
    start, end = np.concatenate(starts), np.concatenate(ends)
    is_filled = end > start
    start, end = start[is_filled], end[is_filled]
    ascending = np.argsort(start)
    return start[ascending], (end - start)[ascending].astype(np.int32)


def _split_long_units(shard: UnitShard, max_content: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token offsets of unit boundaries [U' + 1] and document_index [D + 1], long units cut."""
    lengths = np.asarray(shard.unit_lengths)
    document_index = np.asarray(shard.document_index).astype(np.int64)
    pieces = np.maximum(1, -(-lengths // max_content)).astype(np.int64)
    if len(lengths) and pieces.max() > 1:
        first_piece = np.concatenate([[0], np.cumsum(pieces)])
        piece_lengths = np.full(first_piece[-1], max_content, dtype=np.int32)
        piece_lengths[first_piece[1:] - 1] = lengths - (pieces - 1) * max_content
        lengths, document_index = piece_lengths, first_piece[document_index]
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), document_index


def _no_samples(shards: Sequence[UnitShard], split: Split, validation_fraction: float) -> str:
    num_documents = sum(len(shard.document_index) - 1 for shard in shards)
    found = f"no samples in the {split} split of {len(shards)} shards with {num_documents} documents"
    if split == "all" or num_documents == 0:
        return f"{found}; preprocess some text that is not empty"
    if split == "validation":
        return f"{found}; raise data.validation_fraction ({validation_fraction}) or set data.validation"
    return f"{found}; lower data.validation_fraction ({validation_fraction})"
