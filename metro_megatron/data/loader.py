"""The batches of a run, by step number: no state to save, nothing that depends on the number of ranks."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.blocks import TokenStreams
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.phase import PhaseData
from metro_megatron.data.replacements import ReplacementReader
from metro_megatron.data.samples import SampleIndex
from metro_megatron.data.steps import RunSamples
from metro_megatron.errors import UserError

LAST = 64
"""Samples by which a run that goes on knows the order again."""


class PretrainingData:
    """Batches of one data-parallel rank.

    A step takes the samples at consecutive global positions: train.global_batch_size of them, or as many as have
    train.global_batch_tokens at most. Which samples those are, their masks, their noise keys and the counts over
    the step are the same for every dp_size and for all rows. Every rank computes the rows of the whole step from
    the samples' lengths, and reads the tokens of its own rows only.

    A phase begins at a step, so that the global position at which it does is known when the step before has been
    made. phase_begins are those positions, 0 first, as far as they are known already; phase_indices are the samples of
    train.phases.

    word_starts [V], where objective.whole_word_masking asks for them, are `Tokenizer.word_starts`.

    With split "validation" the same holds under a seed of its own, without phases.

    Raises UserError when a sample does not fit into a packed row, and where tokens of a batch are damaged on the disk.
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
        word_starts: NDArray[np.bool_] | None = None,
        phase_indices: Sequence[SampleIndex] = (),
        phase_begins: Sequence[int] = (0,),
    ):
        assert 0 <= dp_rank < dp_size
        self._samples = RunSamples([index, *phase_indices], config, split, phase_begins)
        self._config = config
        for own, of_phase in zip(self._samples.indices, self._samples.configs, strict=True):
            data = of_phase.data
            assert own.seq_length == data.seq_length
            if data.most_row_places < data.seq_length:
                raise UserError(
                    f"data.micro_batch_tokens is {data.micro_batch_tokens}, less than one sample of "
                    f"data.seq_length {data.seq_length}; raise the one or lower the other"
                )
        self._of_rank = partial(
            PhaseData,
            streams=TokenStreams(shards),
            dp_rank=dp_rank,
            dp_size=dp_size,
            pin_memory=pin_memory,
            cache=cache,
            word_starts=word_starts,
        )
        self._phases: dict[int, PhaseData] = {}

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._samples.indices[0])

    def step_batch(self, step: int, first: int) -> StepBatch:
        """This rank's batch of a step (0-based) whose first sample has the global position `first`.

        The next step begins at the batch's `end`; step 0 at position 0. A phase's first step must have been made, or
        its position been given, before others of it are.
        """
        number = self._samples.at(step, first)
        begins = tuple(self._samples.begins[: number + 1])
        return replace(self._phase(number).step_batch(step, first), phase_begins=begins)

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
            yield self._phase(0).batch(step, first, min(batch_size, num_samples - first))

    def hash_of_last(self, end: int) -> str:
        """Of the samples at the last LAST global positions before `end`: their epochs and tokens, in their order.

        The same on every rank; whoever goes on from `end` can tell whether its order is the same. Checksums of the
        shards are not compared.
        """
        hashed = hashlib.sha256()
        for position in range(max(end - LAST, 0), end):
            hashed.update(self._phase(self._samples.of_position(position)).text(position))
        return hashed.hexdigest()[:16]

    def read_before(self, first: int, end: int) -> float:
        """Share of the samples at global positions first to end that an earlier epoch of their source had, too.

        Of several phases the last one counts.
        """
        if end <= first:
            return 0.0
        number = self._samples.of_position(end - 1)
        begin = max(first, self._samples.begins[number])
        return float((self._samples.phases[number].draws(begin, end - begin).epoch > 0).mean())

    def _steps(self, step: int, first: int) -> Iterator[StepBatch]:
        """Batches without end."""
        while True:
            batch = self.step_batch(step, first)
            yield batch
            step, first = step + 1, batch.end

    def advice(self, first: int) -> str | None:
        """What to change if the steps from the global position `first` waste places (data/fill.py)."""
        return self._phase(self._samples.of_position(first)).advice(first)

    def _phase(self, number: int) -> PhaseData:
        if number not in self._phases:
            self._phases[number] = self._of_rank(self._samples.phases[number])
        return self._phases[number]
