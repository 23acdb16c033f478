"""The batches of one phase of a run: samples in an order, cut into steps, laid into rows, masked."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.rows import RowRule
from metro_megatron.data import fill
from metro_megatron.data.batch import MicroBatchBuilder, StepBatch, StepRows
from metro_megatron.data.blocks import TokenStreams
from metro_megatron.data.masking import Masking
from metro_megatron.data.replacements import ReplacementReader
from metro_megatron.data.steps import PhaseSamples


class PhaseData:
    """Batches of one data-parallel rank as PretrainingData has them."""

    def __init__(
        self,
        samples: PhaseSamples,
        streams: TokenStreams,
        dp_rank: int,
        dp_size: int,
        pin_memory: bool,
        cache: ReplacementReader | None,
        word_starts: NDArray[np.bool_] | None = None,
    ):
        config, index = samples.config, samples.index
        self._samples = samples
        self._index = index
        objective = config.objective
        assert word_starts is not None or not objective.whole_word_masking, "masks would be others"
        masking = Masking(
            samples.order.seed,
            objective.mask_probability,
            objective.keep_probability,
            objective.random_probability,
            config.model.vocab_size,
            config.model.special_ids,
            word_starts if objective.whole_word_masking else None,
        )
        self._streams = streams
        self._builder = MicroBatchBuilder(
            index=index,
            streams=streams.arrays,
            masking=masking,
            is_packed=config.data.is_packed,
            cache=cache,
        )
        self._config = config
        self._rule = RowRule.of(config, dp_size)
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._pin_memory = pin_memory

    def step_batch(self, step: int, first: int) -> StepBatch:
        """Of a step that begins at the global position `first`."""
        return self.batch(step, first, self._samples.count(first))

    def text(self, position: int) -> bytes:
        """The epoch, the length and the tokens, without specials, of the sample at a global position."""
        draws, index = self._samples.draws(position, 1), self._index
        sample, epoch = int(draws.sample[0]), int(draws.epoch[0])
        begin, length = int(index.start[sample]), int(index.length[sample])
        tokens = self._streams.arrays[int(index.shard[sample])][begin : begin + length]
        return np.array([epoch, length, *tokens.tolist()], dtype="<i8").tobytes()

    def advice(self, first: int) -> str | None:
        """What to change if the steps from the global position `first` waste places (data/fill.py)."""
        train, mean = self._config.train, self._index.num_tokens / len(self._index)
        of_step = train.global_batch_size or train.global_batch_tokens / mean
        count = max(round(1.1 * fill.STEPS * of_step), fill.STEPS * fill.tried_samples(self._config, self._dp_size))
        lengths = self._samples.lengths(self._samples.draws(first, count))
        return fill.advice(self._config, self._dp_size, lengths)

    def batch(self, step: int, first: int, num_samples: int) -> StepBatch:
        """Of so many samples from the global position `first`."""
        draws = self._samples.draws(first, num_samples)
        lengths = self._samples.lengths(draws)
        rows = StepRows.of(lengths, self._rule)
        count = self._dp_size
        of_all_ranks = [rows.micro_batches[begin : begin + count] for begin in range(0, len(rows.micro_batches), count)]
        own = [row for of_ranks in of_all_ranks for row in of_ranks[self._dp_rank]]
        # Whole words are counted over all samples of the step.
        read = draws.sample if self._builder.masking.word_starts is not None else draws.sample[np.concatenate(own)]
        self._streams.check(self._index.shard[read], self._index.start[read], self._index.length[read])
        micro_batches = [
            replace(
                self._builder.build(of_ranks[self._dp_rank], rows.length, draws, first),
                samples_of_ranks=tuple(sum(map(len, of_rank)) for of_rank in of_ranks),
            )
            for of_ranks in of_all_ranks
        ]
        if self._pin_memory:
            micro_batches = [micro_batch.pin_memory() for micro_batch in micro_batches]
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            num_masked=self._builder.num_masked(draws),
            num_tokens=int(lengths.sum()),
            num_samples=num_samples,
            num_squares=int((lengths**2).sum()),
            end=first + num_samples,
        )
