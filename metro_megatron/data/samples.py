"""Samples: whole consecutive units of one document, joined up to the longest sample (fairseq's complete_doc).

A sample is a slice of one shard's token stream. U units, D documents, n samples.

Indices of samples lie on the disk, memory-mapped: built once for the same shards, by whoever comes first, and found
under a hash of what they were built from. Processes that need one at the same time, on one machine or several, may all
call: they wait for each other at a file lock, and without locks (some network file systems) each builds its own and the
first to finish stays. Nothing here needs process groups.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.command_line import is_first_on_machine
from metro_megatron.config.schema import DataConfig
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.file_hashes import file_entry
from metro_megatron.data.held_out import held_out_by_content, held_out_by_place
from metro_megatron.data.index_files import ARRAYS, IndexFacts, array_path, index_damage
from metro_megatron.data.mapping import mapped
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.files import first_folder, locked, whole_files

Split = Literal["train", "validation", "all"]
HeldOutBy = Literal["content", "place"]

NUM_SAMPLE_SPECIALS = 2
"""<s> before and </s> after the content of every sample."""

_FORMAT = 2
_MOST_SHARDS = int(np.iinfo(np.int16).max)


@dataclass(frozen=True)
class SampleIndex:
    """Where the content of every sample lies. Sample ids are indices into these arrays, by shard and offset."""

    shard: NDArray[np.int16]
    """[n] shard number."""
    start: NDArray[np.int64]
    """[n] first token in the shard's token stream."""
    length: NDArray[np.int32]
    """[n] content tokens, 1 to seq_length - 2."""
    source_bounds: tuple[int, ...]
    """Source k, the k-th dataset, has sample ids source_bounds[k] to source_bounds[k + 1]."""
    content_tokens: int
    """Tokens of all samples, without <s> and </s>."""
    seq_length: int
    """Longest sample in tokens, <s> and </s> included."""

    def __len__(self) -> int:
        return self.source_bounds[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, <s> and </s> included."""
        return self.content_tokens + NUM_SAMPLE_SPECIALS * len(self)


@dataclass(frozen=True)
class SampleRule:
    """Which samples the shards are cut into."""

    seq_length: int
    split: Split = "all"
    validation_fraction: float = 0.0
    held_out_by: HeldOutBy = "content"

    @property
    def max_content(self) -> int:
        """Tokens of the longest sample without <s> and </s>."""
        return self.seq_length - NUM_SAMPLE_SPECIALS


def build_sample_index(
    shards: Sequence[TokenizedDocuments],
    seq_length: int,
    split: Split = "all",
    validation_fraction: float = 0.0,
    held_out_by: HeldOutBy = "content",
) -> SampleIndex:
    """Samples of the documents of one split, greedily filled with whole units up to seq_length - 2 tokens.

    Documents are never joined. A unit longer than seq_length - 2 counts as several units, cut every
    seq_length - 2 tokens. A document is held out ("validation") if a hash of its ids lies below validation_fraction
    (data/held_out.py); the seed of the run plays no part, so all runs hold out the same.

    Raises UserError when seq_length has no room for content or the split has no samples.
    """
    blocks = list(sample_blocks(shards, SampleRule(seq_length, split, validation_fraction, held_out_by)))
    lengths = np.concatenate([np.empty(0, np.int32), *(block.length for block in blocks)])
    shard = np.repeat([block.shard for block in blocks], [len(block.start) for block in blocks])
    return SampleIndex(
        shard=shard.astype(np.int16),
        start=np.concatenate([np.empty(0, np.int64), *(block.start for block in blocks)]),
        length=lengths,
        source_bounds=source_bounds(shards, np.bincount(shard, minlength=len(shards))),
        content_tokens=int(lengths.sum(dtype=np.int64)),
        seq_length=seq_length,
    )


@dataclass(frozen=True)
class SampleBlock:
    """The samples of consecutive documents of one shard, ascending."""

    shard: int
    start: NDArray[np.int64]
    length: NDArray[np.int32]


def sample_blocks(
    shards: Sequence[TokenizedDocuments], rule: SampleRule, block_documents: int = 1 << 16, block_units: int = 1 << 20
) -> Iterator[SampleBlock]:
    """The samples of all shards in order, in memory of a block of units, one document at least.

    Raises UserError as build_sample_index.
    """
    if rule.seq_length <= NUM_SAMPLE_SPECIALS:
        raise UserError(f"data.seq_length is {rule.seq_length}; it must be at least 3: <s>, one token and </s>")
    if len(shards) > _MOST_SHARDS:
        raise UserError(
            f"{len(shards):,} shards, of which an index can name {_MOST_SHARDS:,}: join some (tools/merge_shards.py)"
        )
    sources = source_numbers(shards)
    is_empty = True
    for number, shard in enumerate(shards):
        first, token, num_documents = 0, 0, len(shard.document_index) - 1
        while first < num_documents:
            index = np.asarray(shard.document_index[first : first + block_documents + 1], dtype=np.int64)
            count = max(1, int(np.searchsorted(index, index[0] + block_units, side="right")) - 1)
            index = index[: count + 1]
            lengths = np.asarray(shard.unit_lengths[index[0] : index[-1]])
            block = _Block(shard, sources[number], first, token, lengths, index - index[0])
            start, length = _samples(lengths, block.document_index, block.chosen(rule), rule.max_content)
            is_empty = is_empty and not len(start)
            yield SampleBlock(number, start + token, length)
            first, token = first + count, token + int(lengths.sum(dtype=np.int64))
    if is_empty:
        raise UserError(_no_samples(shards, rule))


def source_numbers(shards: Sequence[TokenizedDocuments]) -> list[int]:
    """For each shard the number of its dataset among those of all shards, which come dataset by dataset."""
    starts_source = [shard.dataset != before.dataset for before, shard in zip(shards, shards[1:], strict=False)]
    return np.cumsum([0, *starts_source]).tolist()[: len(shards)]


def source_bounds(shards: Sequence[TokenizedDocuments], samples_per_shard: NDArray[np.integer]) -> tuple[int, ...]:
    """SampleIndex.source_bounds."""
    counts = np.bincount(source_numbers(shards), samples_per_shard)
    return tuple(np.cumsum([0, *counts]).astype(int).tolist())


@dataclass(frozen=True)
class _Block:
    """Consecutive documents of a shard."""

    shard: TokenizedDocuments
    source: int
    first_document: int
    """Number in the shard."""
    first_token: int
    """Its place in the shard."""
    lengths: NDArray[np.integer]
    """[U] tokens of each unit."""
    document_index: NDArray[np.int64]
    """[D + 1] document d is units document_index[d] to document_index[d + 1] of these."""

    def chosen(self, rule: SampleRule) -> NDArray[np.bool_]:
        """Which documents [D] belong to the split."""
        count = len(self.document_index) - 1
        if rule.split == "all":
            return np.ones(count, np.bool_)
        if rule.held_out_by == "place":
            first = self.shard.first_document + self.first_document
            is_held_out = held_out_by_place(self.source, first + np.arange(count), rule.validation_fraction)
        else:
            unit_starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
            token_starts = self.first_token + unit_starts[self.document_index]
            is_held_out = held_out_by_content(self.shard, token_starts, rule.validation_fraction)
        return is_held_out if rule.split == "validation" else ~is_held_out


def _samples(
    lengths: NDArray[np.integer], document_index: NDArray[np.int64], chosen: NDArray[np.bool_], max_content: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of the samples of the chosen documents, ascending.

    All documents advance together, one sample at a time, so the number of array operations is the number of
    samples of the longest document.
    """
    unit_ends, document_index = _split_long_units(lengths, document_index, max_content)
    unit, last = document_index[:-1][chosen], document_index[1:][chosen]
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


def _split_long_units(
    lengths: NDArray[np.integer], document_index: NDArray[np.int64], max_content: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token offsets of unit boundaries [U' + 1] and document_index [D + 1], long units cut."""
    pieces = np.maximum(1, -(-lengths // max_content)).astype(np.int64)
    if len(lengths) and pieces.max() > 1:
        first_piece = np.concatenate([[0], np.cumsum(pieces)])
        piece_lengths = np.full(first_piece[-1], max_content, dtype=np.int32)
        piece_lengths[first_piece[1:] - 1] = lengths - (pieces - 1) * max_content
        lengths, document_index = piece_lengths, first_piece[document_index]
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), document_index


def _no_samples(shards: Sequence[TokenizedDocuments], rule: SampleRule) -> str:
    num_documents = sum(len(shard.document_index) - 1 for shard in shards)
    found = f"no samples in the {rule.split} split of {len(shards)} shards with {num_documents} documents"
    if rule.split == "all" or num_documents == 0:
        return f"{found}; preprocess some text that is not empty"
    if rule.split == "validation":
        return f"{found}; raise data.validation_fraction ({rule.validation_fraction}) or set data.validation"
    return f"{found}; lower data.validation_fraction ({rule.validation_fraction})"


def cache_folder(configured: str, prefixes: Sequence[str]) -> Path:
    """Where indices lie: the configured folder, or sample_index beside the first dataset."""
    return Path(configured) if configured else Path(prefixes[0]).parent / "sample_index"


def sample_indices(
    data: DataConfig,
    train: Sequence[Shard],
    validation: Sequence[Shard] = (),
    on_progress: Callable[[int], object] = lambda samples: None,
) -> tuple[SampleIndex, SampleIndex | None]:
    """The indices of a run: its training samples and its held-out ones, of data.validation or of a fraction.

    Raises UserError as cached_sample_index.
    """
    folder = cache_folder(data.index_cache, data.train)
    index = training_index(data, train, on_progress)
    if validation:
        return index, cached_sample_index(validation, SampleRule(data.seq_length), folder, on_progress)
    if data.validation_fraction > 0.0:
        rule = SampleRule(data.seq_length, "validation", data.validation_fraction, data.held_out_by)
        return index, cached_sample_index(train, rule, folder, on_progress)
    return index, None


def training_index(
    data: DataConfig, shards: Sequence[Shard], on_progress: Callable[[int], object] = lambda samples: None
) -> SampleIndex:
    """The index of the training samples alone. Raises UserError as cached_sample_index."""
    fraction = data.validation_fraction
    rule = SampleRule(data.seq_length, "train", fraction, data.held_out_by) if fraction else SampleRule(data.seq_length)
    return cached_sample_index(shards, rule, cache_folder(data.index_cache, data.train), on_progress)


def cached_sample_index(
    shards: Sequence[Shard],
    rule: SampleRule,
    folder: Path,
    on_progress: Callable[[int], object] = lambda samples: None,
) -> SampleIndex:
    """The sample index of the shards, from `folder` or built into it; `on_progress` hears of samples found.

    Nothing is written or locked where it is there already. A damaged one is built again, which is said; one process of
    a machine compares hashes, the others sizes. Raises UserError as build_sample_index, if the folder cannot be
    written, and, so that all start again, when one of several processes has replaced a damaged index.
    """
    target = folder / _key(shards, rule)
    if not _missing_or_damaged(target):
        return _open(target, rule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), wait=True):
            damage, is_replaced = _missing_or_damaged(target), False
            if damage and target.exists():
                print(*damage, f"{target}: is built again", sep="\n", file=sys.stderr, flush=True)
                shutil.rmtree(target)
                is_replaced = True
            if damage:
                _build(shards, rule, target, on_progress)
    except OSError as error:
        raise UserError(
            f"sample index {target}: {error.strerror} ({error.filename}); "
            "set data.index_cache to a folder with room for 14 bytes per sample"
        ) from error
    if is_replaced and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Others compare sizes only: one may have opened what was damaged.
        raise UserError(f"sample index {target}: was damaged and has been built again; start the run again")
    return _open(target, rule)


def _missing_or_damaged(target: Path) -> list[str]:
    """What is wrong with an index; nothing if it is there and whole."""
    return index_damage(target, by_hash=is_first_on_machine())


def _key(shards: Sequence[Shard], rule: SampleRule) -> str:
    sources = zip(source_numbers(shards), shards, strict=True)
    contents = [[source, shard.sha256, shard.index_sha256] for source, shard in sources]
    facts = [_FORMAT, *astuple(rule), contents]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _build(shards: Sequence[Shard], rule: SampleRule, target: Path, on_progress: Callable[[int], object]) -> None:
    samples = np.zeros(len(shards), np.int64)
    tokens = 0
    with first_folder(target) as folder:
        with whole_files([array_path(folder, name) for name in ARRAYS]) as files:
            for block in sample_blocks(shards, rule):
                arrays: list[NDArray[Any]] = [np.full(len(block.start), block.shard), block.start, block.length]
                for file, dtype, values in zip(files, ARRAYS.values(), arrays, strict=True):
                    file.write(values.astype(dtype).data)
                tokens += int(block.length.sum(dtype=np.int64))
                samples[block.shard] += len(block.start)
                on_progress(int(samples.sum()))
        hashes = {name: file_entry(array_path(folder, name)) for name in ARRAYS}
        IndexFacts(source_bounds(shards, samples), tokens, hashes).write(folder)


def _open(folder: Path, rule: SampleRule) -> SampleIndex:
    facts = IndexFacts.read(folder)
    arrays = {name: mapped(array_path(folder, name), dtype) for name, dtype in ARRAYS.items()}
    return SampleIndex(
        **arrays,
        source_bounds=facts.source_bounds,
        content_tokens=facts.content_tokens,
        seq_length=rule.seq_length,
    )
