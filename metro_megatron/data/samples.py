"""Samples: whole consecutive units of one document, joined up to the longest sample (fairseq's complete_doc).

A sample is a slice of one shard's token stream. U units, D documents, n samples.

Indices of samples lie on the disk, memory-mapped: built once for the same shards, by whoever comes first, and found
under a hash of what they were built from. Processes that need one at the same time, on one machine or several, may all
call: they wait for each other at a file lock, and without locks (some network file systems) each builds its own and the
first to finish stays. Nothing here needs process groups.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import DataConfig
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.files import first_folder, locked, whole_files
from metro_megatron.randomness import Purpose, uniform

Split = Literal["train", "validation", "all"]

NUM_SAMPLE_SPECIALS = 2
"""<s> before and </s> after the content of every sample."""

_FORMAT = 1
_ARRAYS: dict[str, np.dtype[Any]] = {"shard": np.dtype("<i2"), "start": np.dtype("<i8"), "length": np.dtype("<i4")}
_FACTS = "index.json"


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

    @property
    def max_content(self) -> int:
        """Tokens of the longest sample without <s> and </s>."""
        return self.seq_length - NUM_SAMPLE_SPECIALS


def build_sample_index(
    shards: Sequence[TokenizedDocuments], seq_length: int, split: Split = "all", validation_fraction: float = 0.0
) -> SampleIndex:
    """Samples of the documents of one split, greedily filled with whole units up to seq_length - 2 tokens.

    Documents are never joined. A unit longer than seq_length - 2 counts as several units, cut every
    seq_length - 2 tokens. A document is held out ("validation") if a hash of its dataset's number in the list
    and its own number in the dataset lies below validation_fraction; the seed of the run plays no part, so all
    runs hold out the same, however the dataset is cut into shards.

    Raises UserError when seq_length has no room for content or the split has no samples.
    """
    blocks = list(sample_blocks(shards, SampleRule(seq_length, split, validation_fraction)))
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
    shards: Sequence[TokenizedDocuments], rule: SampleRule, block_documents: int = 1 << 16
) -> Iterator[SampleBlock]:
    """The samples of all shards in order, in bounded memory. Raises UserError as build_sample_index."""
    if rule.seq_length <= NUM_SAMPLE_SPECIALS:
        raise UserError(f"data.seq_length is {rule.seq_length}; it must be at least 3: <s>, one token and </s>")
    assert len(shards) < np.iinfo(np.int16).max, len(shards)
    sources = source_numbers(shards)
    is_empty = True
    for number, shard in enumerate(shards):
        token = 0
        num_documents = len(shard.document_index) - 1
        for first in range(0, num_documents, block_documents):
            last = min(first + block_documents, num_documents)
            document_index = np.asarray(shard.document_index[first : last + 1], dtype=np.int64)
            lengths = np.asarray(shard.unit_lengths[document_index[0] : document_index[-1]])
            document_index = document_index - document_index[0]
            chosen = _chosen(sources[number], shard.first_document + np.arange(first, last), rule)
            start, length = _samples(lengths, document_index, chosen, rule.max_content)
            is_empty = is_empty and not len(start)
            yield SampleBlock(number, start + token, length)
            token += int(lengths.sum(dtype=np.int64))
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


def _chosen(source: int, documents: NDArray[np.int64], rule: SampleRule) -> NDArray[np.bool_]:
    """Which documents, by their numbers in the dataset, belong to the split."""
    if rule.split == "all":
        return np.ones(len(documents), np.bool_)
    is_held_out = uniform(Purpose.SPLIT, source, documents) < rule.validation_fraction
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
    validation: Sequence[Shard],
    on_progress: Callable[[int], object] = lambda samples: None,
) -> tuple[SampleIndex, SampleIndex | None]:
    """The indices of a run: its training samples and its held-out ones, of data.validation or of a fraction.

    Raises UserError as cached_sample_index.
    """
    folder, fraction = cache_folder(data.index_cache, data.train), data.validation_fraction
    index = training_index(data, train, on_progress)
    if validation:
        return index, cached_sample_index(validation, SampleRule(data.seq_length), folder, on_progress)
    if fraction > 0.0:
        rule = SampleRule(data.seq_length, "validation", fraction)
        return index, cached_sample_index(train, rule, folder, on_progress)
    return index, None


def training_index(
    data: DataConfig, shards: Sequence[Shard], on_progress: Callable[[int], object] = lambda samples: None
) -> SampleIndex:
    """The index of the training samples alone. Raises UserError as cached_sample_index."""
    fraction = data.validation_fraction
    rule = SampleRule(data.seq_length, "train" if fraction > 0.0 else "all", fraction)
    return cached_sample_index(shards, rule, cache_folder(data.index_cache, data.train), on_progress)


def cached_sample_index(
    shards: Sequence[Shard],
    rule: SampleRule,
    folder: Path,
    on_progress: Callable[[int], object] = lambda samples: None,
) -> SampleIndex:
    """The sample index of the shards, from `folder` or built into it; `on_progress` hears of samples found.

    Raises UserError as build_sample_index, and if the folder cannot be written.
    """
    target = folder / _key(shards, rule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), wait=True):
            if not (target / _FACTS).exists():
                _build(shards, rule, target, on_progress)
    except OSError as error:
        raise UserError(
            f"sample index {target}: {error.strerror} ({error.filename}); "
            "set data.index_cache to a folder with room for 14 bytes per sample"
        ) from error
    return _open(target, rule)


def _key(shards: Sequence[Shard], rule: SampleRule) -> str:
    contents = [[shard.first_document == 0, shard.sha256, shard.index_sha256] for shard in shards]
    facts = [_FORMAT, rule.seq_length, rule.split, rule.validation_fraction, contents]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _build(shards: Sequence[Shard], rule: SampleRule, target: Path, on_progress: Callable[[int], object]) -> None:
    samples = np.zeros(len(shards), np.int64)
    tokens = 0
    with first_folder(target) as folder:
        with whole_files([folder / f"{name}.bin" for name in _ARRAYS]) as files:
            for block in sample_blocks(shards, rule):
                arrays: list[NDArray[Any]] = [np.full(len(block.start), block.shard), block.start, block.length]
                for file, dtype, values in zip(files, _ARRAYS.values(), arrays, strict=True):
                    file.write(values.astype(dtype).data)
                tokens += int(block.length.sum(dtype=np.int64))
                samples[block.shard] += len(block.start)
                on_progress(int(samples.sum()))
        facts = {"source_bounds": source_bounds(shards, samples), "content_tokens": tokens}
        (folder / _FACTS).write_text(json.dumps(facts))


def _open(folder: Path, rule: SampleRule) -> SampleIndex:
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    bounds = tuple(facts["source_bounds"])
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in _ARRAYS.items()}
    wrong = [name for name, array in arrays.items() if len(array) != bounds[-1]]
    if wrong:
        raise UserError(f"{folder}: damaged ({', '.join(wrong)}); remove it, it is built again")
    return SampleIndex(
        **arrays, source_bounds=bounds, content_tokens=facts["content_tokens"], seq_length=rule.seq_length
    )
