"""The batch of one optimizer step: rows of samples, dealt out to data-parallel ranks as micro batches.

B rows, S positions, M masked positions, n samples of a micro batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.rows import RowRule
from metro_megatron.data.masking import Cells, Masking
from metro_megatron.data.order import Draws
from metro_megatron.data.packing import balanced
from metro_megatron.data.replacements import ReplacementReader
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleIndex

Rows = list[NDArray[np.int64]]
"""The rows of a micro batch, each the ascending indices into the step's samples of those it holds."""


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass reads. Packed: one row of samples side by side; padded: at most one sample a row."""

    tokens: Tensor
    """int64 [B, S] original ids; padding where there is no sample."""
    masked_tokens: Tensor
    """int64 [B, S] the same with the mask's at masked positions, or what else is read there (Masking.readings)."""
    position_ids: Tensor
    """int64 [B, S] restart at 0 with every sample; 0 where there is none."""
    is_real: Tensor
    """bool [B, S] where there is a sample."""
    masked_index: Tensor
    """int64 [M] masked indices into hidden_states.flatten(0, 1) of mcore's [S, B, H]: s * B + b; ascending."""
    noise_keys: Tensor
    """int32 [M, 2] halves of hash64(seed, SAMPLE, epoch, sample, position) for each of masked_index."""
    sample_lengths: Tensor
    """int32 [n] tokens of each sample with <s> and </s>, row by row, left to right. A row without a sample
    counts as one of length 0."""
    sample_ids: Tensor
    """int64 [n] sample ids in the same order; -1 for a row without a sample."""
    is_packed: bool
    """Whether the one row holds all samples."""
    max_seqlen: int
    """The largest of sample_lengths, known on the host."""
    num_samples: int
    """How many of sample_lengths are not 0, known on the host."""
    samples_of_ranks: tuple[int, ...] = ()
    """num_samples of every data-parallel rank in this micro batch."""
    dropout_seed: Tensor | None = None
    """int64 [1] of the step; None where nothing is dropped."""
    crop_keys: Tensor | None = None
    """int64 [n] 63 bits of hash64(seed, CROP, epoch, sample); 0 for a row without a sample."""
    sample_places: Tensor | None = None
    """int64 [n] global positions of the samples in the run's order; -1 for a row without a sample."""
    replacements: Tensor | None = None
    """int64 [M] ids to put at masked_index, where a cache holds them."""

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [n + 1] where the samples of a packed row begin, and where the last one ends."""
        return functional.pad(self.sample_lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def token_keys(self) -> Tensor:
        """int64 [B, S] sample id and position of every token, in one number; of no meaning in padding."""
        samples = self.sample_ids[:, None]
        if self.is_packed:
            column = torch.arange(self.tokens.size(1), device=self.tokens.device)
            number = torch.bucketize(column, self.cu_seqlens[1:], right=True)
            # Columns behind the last sample are padding, of which no key is asked.
            samples = self.sample_ids[number.clamp(max=len(self.sample_ids) - 1)][None]
        return samples << 32 | self.position_ids

    @property
    def first_index(self) -> Tensor:
        """int64 [num_samples] index of each sample's first token, <s>, in hidden_states.flatten(0, 1)."""
        if self.is_packed:
            return self.cu_seqlens[:-1].long()[self.sample_index]  # one row: the index is the position
        return self.sample_index  # position 0 of every row

    @property
    def sample_index(self) -> Tensor:
        """int64 [num_samples] which of sample_lengths are not 0, ascending."""
        # A mask as index would wait for the device to count it.
        return (self.sample_lengths == 0).to(torch.uint8).argsort(stable=True)[: self.num_samples]

    @property
    def is_masked(self) -> Tensor:
        """bool [B, S] where masked_index points."""
        rows, length = self.tokens.shape
        is_masked = torch.zeros(length * rows, dtype=torch.bool, device=self.tokens.device)
        return is_masked.index_fill(0, self.masked_index, True).view(length, rows).t()

    @property
    def masked_targets(self) -> Tensor:
        """int64 [M] original ids at masked_index."""
        return self.tokens.t().reshape(-1)[self.masked_index]

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on a device; asynchronous when the tensors are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class StepBatch:
    """One data-parallel rank's share of a step, and the counts that divide the losses of the whole step."""

    step: int
    micro_batches: list[MicroBatch]
    """As many on every rank."""
    num_masked: int
    """Masked tokens of the step over all ranks."""
    num_tokens: int
    """Tokens of the step over all ranks, <s> and </s> included, padding not."""
    num_samples: int
    """Samples of the step over all ranks."""
    num_squares: int
    """Sum over the step's samples of their lengths squared, which is what attention's cost grows with."""
    end: int
    """Global position of the first sample after the step."""
    phase_begins: tuple[int, ...] = (0,)
    """Global positions at which the phases up to the step's begin."""


@dataclass(frozen=True)
class StepRows:
    """Where the samples of a step lie, on all ranks."""

    micro_batches: list[Rows]
    """Micro batch m belongs to data-parallel rank m % dp_size; there are as many for each."""
    length: int
    """S of all of them."""

    @classmethod
    def of(cls, lengths: NDArray[np.integer], rule: RowRule) -> "StepRows":
        """Of samples with these lengths, specials included, in step order."""
        data = rule.data
        if data.is_packed:
            packed, length = balanced(lengths, rule)
            return cls([[row] for row in packed], length)
        rows: Rows = list(np.arange(len(lengths)).reshape(-1, 1))
        size = data.micro_batch_size
        count = -(-len(rows) // (size * rule.dp_size)) * rule.dp_size
        count = max(count, rule.least_micro_batches * rule.dp_size)
        rows += [np.empty(0, dtype=np.int64)] * (count * size - len(rows))
        return cls([rows[first : first + size] for first in range(0, len(rows), size)], data.seq_length)

    @property
    def num_places(self) -> int:
        """For tokens, in all rows."""
        return self.length * sum(map(len, self.micro_batches))


@dataclass(frozen=True)
class MicroBatchBuilder:
    """Reads and masks the samples of a micro batch."""

    index: SampleIndex
    streams: Sequence[NDArray[np.integer]]
    """Token stream of every shard."""
    masking: Masking
    is_packed: bool
    cache: ReplacementReader | None = None
    """Replacements that are known already."""

    def build(self, rows: Rows, row_length: int, draws: Draws, first: int = 0) -> MicroBatch:
        """The micro batch of these rows of indices into `draws`; a sample's masks do not depend on the rows.

        row_length: S; first: global position of the first draw.
        """
        places = first + np.concatenate(rows)
        own = draws[np.concatenate(rows)]
        lengths = self.index.length[own.sample]
        row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        begins = _first_cells(row_of, lengths + NUM_SAMPLE_SPECIALS, row_length)
        tokens, position_ids, is_real = self._cells(own.sample, begins, len(rows) * row_length)

        drawn, position = self.masking.positions(own, lengths, Cells(tokens, begins))
        cell = begins[drawn] + position
        row, column = np.divmod(cell, row_length)
        # Cells are b * S + s, mcore's hidden states s * B + b: what is ascending in the one is not in the other.
        masked_index = column * len(rows) + row
        ascending = np.argsort(masked_index, kind="stable")
        masked_tokens = tokens.copy()
        masked_tokens[cell] = self.masking.readings(own[drawn], position, tokens[cell])

        without_sample = np.flatnonzero([len(row) == 0 for row in rows])
        before = np.searchsorted(row_of, without_sample)
        sample_lengths = np.insert(lengths + NUM_SAMPLE_SPECIALS, before, 0)
        replacements = None
        if self.cache:
            replacements = self.cache.read(places, np.bincount(drawn, minlength=len(own)))[ascending]
        return MicroBatch(
            tokens=torch.from_numpy(tokens).view(len(rows), -1),
            masked_tokens=torch.from_numpy(masked_tokens).view(len(rows), -1),
            position_ids=torch.from_numpy(position_ids).view(len(rows), -1),
            is_real=torch.from_numpy(is_real).view(len(rows), -1),
            masked_index=torch.from_numpy(masked_index[ascending]),
            noise_keys=torch.from_numpy(self.masking.noise_keys(own[drawn], position)[ascending]),
            sample_lengths=torch.from_numpy(sample_lengths.astype(np.int32)),
            sample_ids=torch.from_numpy(np.insert(own.sample, before, -1)),
            is_packed=self.is_packed,
            max_seqlen=int(sample_lengths.max()),
            num_samples=len(own),
            crop_keys=torch.from_numpy(np.insert(self.masking.crop_keys(own), before, 0)),
            sample_places=torch.from_numpy(np.insert(places, before, -1)),
            replacements=None if replacements is None else torch.from_numpy(replacements),
        )

    def num_masked(self, draws: Draws) -> int:
        """Masked tokens of these samples, which have to be read for it where whole words are masked."""
        lengths = self.index.length[draws.sample]
        if self.masking.word_starts is None:
            return int(self.masking.counts(draws, lengths).sum())
        ends = np.cumsum(lengths + NUM_SAMPLE_SPECIALS, dtype=np.int64)
        begins = ends - lengths - NUM_SAMPLE_SPECIALS
        tokens, _, _ = self._cells(draws.sample, begins, int(ends[-1]))
        return len(self.masking.positions(draws, lengths, Cells(tokens, begins))[0])

    def _cells(
        self, samples: NDArray[np.int64], begins: NDArray[np.int64], num_cells: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens, position ids and is_real of all num_cells = B * S cells, each sample from its cell in `begins`."""
        special_ids = self.masking.special_ids
        tokens = np.full(num_cells, special_ids.pad, dtype=np.int64)
        position_ids = np.zeros_like(tokens)
        is_real = np.zeros(len(tokens), dtype=np.bool_)
        positions = np.arange(self.index.seq_length)
        index = self.index
        slices = np.stack([begins, index.shard[samples], index.start[samples], index.length[samples]], axis=1)
        for begin, shard, start, length in slices.tolist():
            last = begin + length + 1
            tokens[begin] = special_ids.bos
            tokens[begin + 1 : last] = self.streams[shard][start : start + length]
            tokens[last] = special_ids.eos
            position_ids[begin : last + 1] = positions[: length + NUM_SAMPLE_SPECIALS]
            is_real[begin : last + 1] = True
        return tokens, position_ids, is_real


def _first_cells(row_of: NDArray[np.int64], lengths: NDArray[np.integer], row_length: int) -> NDArray[np.int64]:
    """Cell b * S + s of the first token of each sample; samples of a row follow one another without a gap."""
    earlier = np.cumsum(lengths, dtype=np.int64) - lengths
    first_of_row = np.searchsorted(row_of, row_of)
    return row_of * row_length + earlier - earlier[first_of_row]
