"""The batches of a run, by step number: no state to save, nothing that depends on the number of ranks."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import Config
from metro_megatron.data import fill
from metro_megatron.data.batch import MicroBatchBuilder, StepBatch, StepRows
from metro_megatron.data.blending import Blend, source_weights
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.fill import step_samples
from metro_megatron.data.masking import Masking
from metro_megatron.data.order import Draws, SampleOrder
from metro_megatron.data.replacements import ReplacementReader
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleIndex
from metro_megatron.errors import UserError
from metro_megatron.randomness import Purpose, hash64


class PretrainingData:
    """Batches of one data-parallel rank.

    A step takes the samples at consecutive global positions: train.global_batch_size of them, or as many as have
    train.global_batch_tokens at most. Which samples those are, their masks, their noise keys and the counts over
    the step are the same for every dp_size and for all rows. Every rank computes the rows of the whole step from
    the samples' lengths, and reads the tokens of its own rows only.

    With split "validation" the same holds under a seed of its own.

    Raises UserError when a sample does not fit into a packed row.
    """

    def __init__(
        self,
        index: SampleIndex,
        shards: Sequence[TokenizedDocuments],
        config: Config,
        *,
        split: Literal["train", "validation"] = "train",
        dp_rank: int = 0,
        dp_size: int = 1,
        pin_memory: bool = False,
        cache: ReplacementReader | None = None,
    ):
        data = config.data
        assert 0 <= dp_rank < dp_size and index.seq_length == data.seq_length
        if data.most_row_places < data.seq_length:
            raise UserError(
                f"data.micro_batch_tokens is {data.micro_batch_tokens}, less than one sample of "
                f"data.seq_length {data.seq_length}; raise the one or lower the other"
            )
        seed = config.train.seed
        if split == "validation":
            seed = int(hash64(seed, Purpose.VALIDATION))
        self._index = index
        sizes = np.diff(index.source_bounds).tolist()
        weights = source_weights(data.weights if split == "train" else [], sizes)
        self._order = SampleOrder(index.source_bounds, Blend(weights), seed)
        objective = config.objective
        self._masking = Masking(
            seed,
            objective.mask_probability,
            objective.keep_probability,
            objective.random_probability,
            config.model.vocab_size,
        )
        self._builder = MicroBatchBuilder(
            index=index,
            streams=[np.asarray(shard.tokens) for shard in shards],
            masking=self._masking,
            is_packed=data.is_packed,
            cache=cache,
        )
        self._config = config
        self._rule = RowRule.of(config, dp_size)
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._pin_memory = pin_memory

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._index)

    def step_batch(self, step: int, first: int) -> StepBatch:
        """This rank's batch of a step (0-based) whose first sample has the global position `first`.

        The next step begins at the batch's `end`; step 0 at position 0.
        """
        return self._batch(step, first, self._step_samples(first))

    def prefetch(self, first_step: int, end_step: int, first: int) -> Generator[StepBatch, None, None]:
        """step_batch of range(first_step, end_step), data.prefetch_steps of them prepared ahead by a thread.

        `first` is the global position at which first_step begins. What step_batch raises is raised here at its
        step. Closing the iterator ends the thread.
        """
        steps = self._steps(first_step, first)
        if self._config.data.prefetch_steps == 0:
            yield from islice(steps, end_step - first_step)
            return
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        ahead: deque[Future[StepBatch]] = deque()
        try:
            for step in range(first_step, end_step + self._config.data.prefetch_steps):
                if step < end_step:
                    ahead.append(thread.submit(next, steps))
                if step >= first_step + self._config.data.prefetch_steps:
                    yield ahead.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

    def evaluation_batches(self, num_samples: int, batch_size: int) -> Iterator[StepBatch]:
        """The first num_samples samples of the order's first epoch, each once; the last batch may be smaller.

        The same samples and masks at every call. num_samples is at most self.num_samples.
        """
        assert num_samples <= self.num_samples, (num_samples, self.num_samples)
        for step, first in enumerate(range(0, num_samples, batch_size)):
            yield self._batch(step, first, min(batch_size, num_samples - first))

    def _steps(self, step: int, first: int) -> Iterator[StepBatch]:
        """Batches without end."""
        while True:
            batch = self.step_batch(step, first)
            yield batch
            step, first = step + 1, batch.end

    def read_before(self, first: int, end: int) -> float:
        """Share of the samples at global positions first to end that an earlier epoch of their source had, too."""
        return float((self._order[np.arange(first, end)].epoch > 0).mean()) if end > first else 0.0

    def advice(self, first: int) -> str | None:
        """What to change if the steps from the global position `first` waste places (data/fill.py)."""
        train, mean = self._config.train, self._index.num_tokens / len(self._index)
        of_step = train.global_batch_size or train.global_batch_tokens / mean
        count = max(round(1.1 * fill.STEPS * of_step), fill.STEPS * fill.MOST_SAMPLES * self._dp_size)
        lengths = self._lengths(self._order[np.arange(first, first + count)])
        return fill.advice(self._config, self._dp_size, lengths)

    def _step_samples(self, first: int) -> int:
        """How many samples a step has that begins at the global position `first`."""
        train = self._config.train
        if train.global_batch_size:
            return train.global_batch_size
        # 5% more samples than fit on average: in a step of a million tokens, some thousand samples, that is about four
        # standard deviations of their sum. Too few are noticed, and cost a second look at more.
        count = int(1.05 * train.global_batch_tokens * len(self._index) / self._index.num_tokens) + 1
        while (found := step_samples(self._lengths(self._order[np.arange(first, first + count)]), train)) is None:
            count += count // 4 + 1
        return found

    def _lengths(self, draws: Draws) -> NDArray[np.int64]:
        """Tokens of samples, <s> and </s> included."""
        return self._index.length[draws.sample].astype(np.int64) + NUM_SAMPLE_SPECIALS

    def _batch(self, step: int, first: int, num_samples: int) -> StepBatch:
        draws: Draws = self._order[np.arange(first, first + num_samples)]
        lengths = self._lengths(draws)
        rows = StepRows.of(lengths, self._rule)
        count = self._dp_size
        of_all_ranks = [rows.micro_batches[begin : begin + count] for begin in range(0, len(rows.micro_batches), count)]
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
            num_masked=int(self._masking.counts(draws, self._index.length[draws.sample]).sum()),
            num_tokens=int(lengths.sum()),
            num_samples=num_samples,
            num_squares=int((lengths**2).sum()),
            end=first + num_samples,
        )
