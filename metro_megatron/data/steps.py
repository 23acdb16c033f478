"""Which samples a step has: those at consecutive global positions of the order, whatever its rows are."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import Config, TrainConfig
from metro_megatron.data.blending import Blend, source_weights
from metro_megatron.data.order import Draws, SampleOrder
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleIndex
from metro_megatron.randomness import Purpose, hash64


class StepSamples:
    """The samples of every step of a run, or of its held-out ones under a seed of their own."""

    def __init__(self, index: SampleIndex, config: Config, split: Literal["train", "validation"] = "train"):
        self.seed = config.train.seed
        if split == "validation":
            self.seed = int(hash64(self.seed, Purpose.VALIDATION))
        self._index = index
        self._train = config.train
        weights = source_weights(config.data.weights if split == "train" else [], np.diff(index.source_bounds).tolist())
        self.order = SampleOrder(index.source_bounds, Blend(weights), self.seed)

    def draws(self, first: int, count: int) -> Draws:
        """Of the `count` global positions from `first` on."""
        return self.order[np.arange(first, first + count)]

    def lengths(self, draws: Draws) -> NDArray[np.int64]:
        """Tokens of samples, <s> and </s> included."""
        return self._index.length[draws.sample].astype(np.int64) + NUM_SAMPLE_SPECIALS

    def count(self, first: int) -> int:
        """How many samples a step has that begins at the global position `first`."""
        if self._train.global_batch_size:
            return self._train.global_batch_size
        # 5% more samples than fit on average: in a step of a million tokens, some thousand samples, that is about four
        # standard deviations of their sum. Too few are noticed, and cost a second look at more.
        index = self._index
        count = int(1.05 * self._train.global_batch_tokens * len(index) / index.num_tokens) + 1
        while (found := step_samples(self.lengths(self.draws(first, count)), self._train)) is None:
            count += count // 4 + 1
        return found

    def starts(self, step: int, first: int) -> Iterator[tuple[int, int]]:
        """(step, global position at which it begins) of all steps from one on, of which that is known."""
        while True:
            yield step, first
            step, first = step + 1, first + self.count(first)


def step_samples(lengths: NDArray[np.int64], train: TrainConfig) -> int | None:
    """How many samples a step has that begins with these; None where they are too few to tell."""
    if train.global_batch_size:
        return train.global_batch_size if train.global_batch_size <= len(lengths) else None
    ends = np.cumsum(lengths)
    if not ends.size or ends[-1] <= train.global_batch_tokens:  # a next sample may fit
        return None
    return int(np.searchsorted(ends, train.global_batch_tokens, side="right"))
