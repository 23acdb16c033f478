"""Documents to rehearse with where the run's own are not at hand: lengths as Wikipedia's are assumed to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from metro_megatron.config.schema import Config
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import SampleIndex, build_sample_index
from metro_megatron.parallel.layout import Layout
from metro_megatron.vocabulary import NUM_SPECIALS

RankData = Callable[[Layout], PretrainingData]
"""The batches of a rank; train.corpus.Corpus.training_data is one."""

DOCUMENTS = 5_000
MEDIAN, SPREAD = 280, 1.28
"""Tokens of a document, lognormal: 640 on average."""
UNITS = (5, 45)
"""Tokens of a unit, from and to."""


@dataclass(frozen=True)
class AssumedDocuments:
    """Documents without a text, the same in every rehearsal; a step may read some twice."""

    config: Config
    documents: TokenizedDocuments
    indices: Sequence[SampleIndex]
    """Of the run and of its phases."""

    @classmethod
    def draw(cls, config: Config) -> AssumedDocuments:
        generator = np.random.default_rng(0)
        totals = np.maximum(1, generator.lognormal(np.log(MEDIAN), SPREAD, DOCUMENTS).astype(np.int64))
        units = []
        for total in totals:
            ends = np.cumsum(generator.integers(UNITS[0], UNITS[1] + 1, total // UNITS[0] + 1))
            units.append(np.diff([0, *ends[ends < total], total]))
        documents = TokenizedDocuments(
            tokens=np.full(totals.sum(), NUM_SPECIALS, dtype=np.int32),
            unit_lengths=np.concatenate(units),
            document_index=np.cumsum([0, *map(len, units)], dtype=np.int64),
        )
        indices = [build_sample_index([documents], phase.data.seq_length) for phase in config.by_phase]
        return cls(config, documents, indices)

    def training_data(self, layout: Layout) -> PretrainingData:
        return self.batches(layout.data.rank(), layout.data.size())

    def batches(self, dp_rank: int, dp_size: int) -> PretrainingData:
        """Of one data-parallel rank."""
        index, *of_phases = self.indices
        return PretrainingData(
            index, [self.documents], self.config, dp_rank=dp_rank, dp_size=dp_size, phase_indices=of_phases
        )
