"""What is in a dataset, by source: counts, lengths, and what rows of one sample each would waste.

Samples are cut as training cuts them, a block of documents at a time, so memory does not grow with the dataset.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import DataConfig, ParallelConfig, TrainConfig
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.manifest import EDGES, LengthHistogram, SourceEntry, Statistics
from metro_megatron.data.packing import balanced
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleRule, sample_blocks
from metro_megatron.data.shards import Shard, token_dtype
from metro_megatron.preprocess.parts import source_blocks

SEQ_LENGTHS = (128, 512)
"""Rows whose padding is shown."""

_STEP_TOKENS = TrainConfig().global_batch_tokens
_RULE = RowRule(DataConfig(), ParallelConfig(), dp_size=1)
_BAR = 24


@dataclass(frozen=True)
class SampleLengths:
    """Lengths of all samples of a source, <s> and </s> included."""

    seq_length: int
    counts: NDArray[np.int64]
    """[seq_length + 1] samples of each length."""

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.counts @ np.arange(len(self.counts)))

    @cached_property
    def padded_waste(self) -> float:
        """Share of padding with one sample a row of seq_length."""
        return 1.0 - self.num_tokens / (self.num_samples * self.seq_length)

    @cached_property
    def packed_waste(self) -> float:
        """Share of padding in packed rows, in a step of default size with samples drawn at random (seed 0)."""
        drawn = int(_STEP_TOKENS * self.num_samples / self.num_tokens)
        share = self.counts / self.num_samples
        lengths = np.random.default_rng(0).choice(len(share), drawn, p=share)
        rows, length = balanced(lengths, _RULE)
        return 1.0 - int(lengths.sum()) / (length * len(rows))


@dataclass(frozen=True)
class SourceLengths:
    """One source of a dataset."""

    name: str
    statistics: Statistics
    """As the manifest says."""
    samples: tuple[SampleLengths, ...]
    """For each of SEQ_LENGTHS; none without documents."""
    left_out: dict[str, int]
    """Rejected records and dropped documents by reason."""


def source_lengths(prefix: str, on_bytes: Callable[[int], object] = lambda size: None) -> list[SourceLengths]:
    """All sources of a dataset; `on_bytes` hears of the bytes of ids of every block of documents.

    Raises UserError as Shard.open_all.
    """
    manifest = Shard.open_all(prefix)[0].manifest
    itemsize = token_dtype(manifest.vocab_size).itemsize
    counts = [[np.zeros(length + 1, np.int64) for length in SEQ_LENGTHS] for _ in manifest.sources]
    for source, block in source_blocks(prefix, manifest):
        documents = TokenizedDocuments(np.empty(0, np.int32), block.unit_lengths, block.unit_starts)
        for seq_length, found in zip(SEQ_LENGTHS, counts[source], strict=True):
            for samples in sample_blocks([documents], SampleRule(seq_length)):
                found += np.bincount(samples.length + NUM_SAMPLE_SPECIALS, minlength=seq_length + 1)
        on_bytes(int(block.token_starts[-1]) * itemsize)
    return [
        SourceLengths(
            source.name,
            source,
            tuple(SampleLengths(*pair) for pair in zip(SEQ_LENGTHS, found, strict=True) if pair[1].any()),
            _left_out(source),
        )
        for source, found in zip(manifest.sources, counts, strict=True)
    ]


def _left_out(source: SourceEntry) -> dict[str, int]:
    rejected = {f"rejected, {reason}": count for reason, count in source.rejects.items()}
    return rejected | {f"left out, {reason}": count for reason, count in source.dropped.items()}


def all_sources(sources: Sequence[SourceLengths]) -> SourceLengths:
    """The sources of a dataset as one."""
    total = replace(sources[0], name="all sources")
    for source in sources[1:]:
        left_out = {
            reason: total.left_out.get(reason, 0) + source.left_out.get(reason, 0)
            for reason in {**total.left_out, **source.left_out}
        }
        total = replace(
            total,
            statistics=total.statistics + source.statistics,
            samples=_add(total.samples, source.samples),
            left_out=left_out,
        )
    return total


def _add(first: tuple[SampleLengths, ...], second: tuple[SampleLengths, ...]) -> tuple[SampleLengths, ...]:
    if not first or not second:
        return first or second
    return tuple(
        SampleLengths(one.seq_length, one.counts + other.counts) for one, other in zip(first, second, strict=True)
    )


def describe(source: SourceLengths) -> str:
    """Counts, padding and histograms of a source, as lines of text."""
    statistics = source.statistics
    documents, units, tokens = statistics.documents, statistics.units, statistics.tokens
    rows = [
        ("documents", f"{documents:,}"),
        ("units", f"{units:,}, {tokens / max(1, units):,.1f} tokens each"),
        ("tokens", f"{tokens:,}, {tokens / max(1, documents):,.1f} per document"),
    ]
    rows += [(reason, f"{count:,}") for reason, count in source.left_out.items()]
    for samples in source.samples:
        text = f"{samples.num_samples:,}, {samples.num_tokens / samples.num_samples:,.1f} tokens each; padding"
        packed = f"{samples.packed_waste:.2%} in packed rows of at most {_RULE.data.micro_batch_tokens:,}"
        rows.append((f"samples of {samples.seq_length}", f"{text} {samples.padded_waste:.1%} in own rows, {packed}"))
    table = [f"  {name:<24} {value}" for name, value in rows]
    return "\n".join([source.name, *table, *_histograms(statistics)])


def _histograms(statistics: Statistics) -> list[str]:
    """Lengths of documents and units side by side, a line for each power of 2."""
    columns = [by_powers(one) for one in (statistics.document_lengths, statistics.unit_lengths)]
    filled = np.flatnonzero(columns[0] + columns[1])
    if not filled.size:
        return []
    lines = [f"  {'length in tokens':<24} {'documents':<{_BAR + 16}} units"]
    for power in range(filled[0], filled[-1] + 1):
        name = f"{1 << power:,} to {(2 << power) - 1:,}" if power else "1"
        cells = [f"{column[power]:>13,}  {_bar(column[power], column.max())}" for column in columns]
        lines.append(f"  {name:>22}  {cells[0]:<{_BAR + 16}}{cells[1]}".rstrip())
    return lines


def by_powers(histogram: LengthHistogram) -> NDArray[np.int64]:
    """[p] how many lengths lie from 2^p to below 2^(p + 1)."""
    powers = np.floor(np.log2(EDGES)).astype(np.int64)
    return np.bincount(powers, histogram.counts).astype(np.int64)


def _bar(count: int, largest: int) -> str:
    return "#" * int(np.ceil(_BAR * count / largest))
