"""What is read in a rehearsal: the run's own documents, or others with lengths as Wikipedia's are assumed to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.manifest import DatasetPaths
from metro_megatron.data.samples import SampleIndex, build_sample_index
from metro_megatron.train.corpus import Corpus
from metro_megatron.vocabulary import NUM_SPECIALS

STEPS = 2
"""Of a rehearsal: the first, in which megatron-core learns when gradients are complete, and one as all others are."""
ASSUMED = 5_000
"""Documents where the run's own are not at hand; a step may read some of them twice."""
MEDIAN, SPREAD = 280, 1.28
"""Of their tokens, lognormal: 640 on average."""
UNITS = (5, 45)
"""Tokens of their units, from and to."""


@dataclass(frozen=True)
class Documents:
    """Documents and their samples, of a run in one phase."""

    config: Config
    shards: Sequence[TokenizedDocuments]
    index: SampleIndex
    description: str
    word_starts: NDArray[np.bool_] | None = None
    """[V], where whole words are masked."""

    @classmethod
    def find(cls, config: Config) -> Documents:
        """The run's own where all of them are on this machine, assumed ones elsewhere. Raises UserError as Corpus."""
        prefixes = [*config.data.train, *config.data.validation]
        if all(DatasetPaths(prefix).manifest.exists() for prefix in prefixes):
            return cls.of(Corpus.open(config))
        return cls.assumed(config)

    @classmethod
    def of(cls, corpus: Corpus) -> Documents:
        """A corpus's."""
        description = f"those of {', '.join(corpus.config.data.train)}"
        return cls(corpus.config, corpus.train_shards, corpus.train_index, description, corpus.word_starts)

    @classmethod
    def assumed(cls, config: Config) -> Documents:
        """The same in every rehearsal, without a text."""
        generator = np.random.default_rng(0)
        totals = np.maximum(1, generator.lognormal(np.log(MEDIAN), SPREAD, ASSUMED).astype(np.int64))
        units = []
        for total in totals:
            ends = np.cumsum(generator.integers(UNITS[0], UNITS[1] + 1, total // UNITS[0] + 1))
            units.append(np.diff([0, *ends[ends < total], total]))
        documents = TokenizedDocuments(
            tokens=np.full(totals.sum(), NUM_SPECIALS, dtype=np.int32),
            unit_lengths=np.concatenate(units),
            document_index=np.cumsum([0, *map(len, units)], dtype=np.int64),
        )
        index = build_sample_index([documents], config.data.seq_length)
        description = "data.train is not here: as long as Wikipedia's are assumed to be"
        each_token = np.ones(config.model.vocab_size, dtype=np.bool_) if config.objective.whole_word_masking else None
        return cls(config, [documents], index, description, each_token)

    @property
    def fill(self) -> float:
        """Share of data.seq_length that a sample has on average."""
        return self.index.num_tokens / len(self.index) / self.index.seq_length

    def batches(self, dp_rank: int, dp_size: int) -> list[StepBatch]:
        """Of a data-parallel rank in STEPS steps."""
        return list(self._data(dp_rank, dp_size).prefetch(0, STEPS, 0))

    def evaluation(self, dp_rank: int, dp_size: int) -> list[StepBatch]:
        """Of a data-parallel rank in an evaluation: at most a batch and half a one, of which all are like one."""
        train = self.config.train
        size = train.global_batch_size or max(1, train.global_batch_tokens // self.config.data.seq_length)
        count = min(train.eval_samples, size + max(1, size // 2), len(self.index))
        return list(self._data(dp_rank, dp_size).evaluation_batches(count, size))

    def advice(self, dp_size: int) -> str | None:
        """What to change if the ranks' rows would be padding (data/fill.py)."""
        return self._data(0, dp_size).advice(0)

    def _data(self, dp_rank: int, dp_size: int) -> PretrainingData:
        return PretrainingData(
            self.index, self.shards, self.config, dp_rank=dp_rank, dp_size=dp_size, word_starts=self.word_starts
        )
