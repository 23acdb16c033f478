"""Which samples a step has: those at consecutive global positions of its phase's order, whatever its rows are."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import Config, TrainConfig
from metro_megatron.data.blending import Blend, source_weights
from metro_megatron.data.order import Draws, SampleOrder
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS, SampleIndex
from metro_megatron.randomness import Purpose, hash64


class PhaseSamples:
    """The samples of every step of one phase. config: of a run that is all in this phase."""

    def __init__(self, index: SampleIndex, config: Config, order: SampleOrder):
        self.index = index
        self.config = config
        self.order = order

    def draws(self, first: int, count: int) -> Draws:
        """Of the `count` global positions from `first` on."""
        return self.order[np.arange(first, first + count)]

    def lengths(self, draws: Draws) -> NDArray[np.int64]:
        """Tokens of samples, <s> and </s> included."""
        return self.index.length[draws.sample].astype(np.int64) + NUM_SAMPLE_SPECIALS

    def count(self, first: int) -> int:
        """How many samples a step has that begins at the global position `first`."""
        train, index = self.config.train, self.index
        if train.global_batch_size:
            return train.global_batch_size
        # 5% more samples than fit on average: in a step of a million tokens, some thousand samples, that is about four
        # standard deviations of their sum. Too few are noticed, and cost a second look at more.
        count = int(1.05 * train.global_batch_tokens * len(index) / index.num_tokens) + 1
        while (found := step_samples(self.lengths(self.draws(first, count)), train)) is None:
            count += count // 4 + 1
        return found


class RunSamples:
    """The samples of every step of a run, phase by phase.

    A phase begins at a step, so that the global position at which it does is known when the step before has been
    counted. `begins` are those positions, 0 first, as far as they are known; indices are the samples of the run and of
    train.phases. With split "validation" there are held-out samples, under a seed of their own and without phases.
    """

    def __init__(
        self,
        indices: Sequence[SampleIndex],
        config: Config,
        split: Literal["train", "validation"] = "train",
        begins: Sequence[int] = (0,),
    ):
        self._is_training = split == "train"
        self._config = config if self._is_training else config.by_phase[0]
        self.configs = self._config.by_phase
        self.indices = indices
        seed = config.train.seed if self._is_training else int(hash64(config.train.seed, Purpose.VALIDATION))
        order = SampleOrder(indices[0].source_bounds, self._blend(0), seed)
        self.phases = [PhaseSamples(indices[0], self.configs[0], order)]
        self.begins = [0]
        for begin in begins[1:]:
            self._begin_phase(begin)

    def at(self, step: int, first: int) -> int:
        """Number of the phase of a step (0-based) that begins at the global position `first`.

        A phase's first step must have been asked for, or its position been given, before others of it are.
        """
        number = self._config.phase_at(step)
        if step == self._config.phase_starts[number] and number == len(self.phases):
            self._begin_phase(first)
        return number

    def of_position(self, first: int) -> int:
        """Number of the phase that a global position is in."""
        return bisect_right(self.begins, first) - 1

    def after(self, step: int, first: int) -> int:
        """The global position behind a step that begins at `first`."""
        return first + self.phases[self.at(step, first)].count(first)

    def position(
        self,
        step: int,
        known: Callable[[int], tuple[int, int]] = lambda step: (0, 0),
        on_step: Callable[[int], object] = lambda done: None,
    ) -> int:
        """The global position at which a step (0-based) begins; makes the phases up to it.

        known: (steps done, global position) not behind a step, from which on steps are counted; `on_step` hears of
        each.
        """
        size, done, first = self._config.train.global_batch_size, 0, 0
        for target in [*(start for start in self._config.phase_starts[1:] if start < step), step]:
            done, first = (target, target * size) if size else max((done, first), known(target))
            while done < target:
                done, first = done + 1, self.after(done, first)
                on_step(done)
            self.at(target, first)
        return first

    def _begin_phase(self, position: int) -> None:
        """Make the next phase, which begins at a global position."""
        number, before = len(self.phases), self.phases[-1].order
        bounds, blend = self.indices[number].source_bounds, self._blend(number)
        is_same = self.indices[number].seq_length == self.indices[number - 1].seq_length
        order = before.continued(position, blend) if is_same else before.cut_anew(position, blend, bounds)
        # In this order: `of_position` is asked by another thread, and must find a phase for every beginning.
        self.phases.append(PhaseSamples(self.indices[number], self.configs[number], order))
        self.begins.append(position)

    def _blend(self, number: int) -> Blend:
        sizes = np.diff(self.indices[number].source_bounds).tolist()
        if not self._is_training:
            return Blend(source_weights([], sizes))
        weights = self.configs[number].data.weights
        return Blend(source_weights(weights, sizes, may_rest=len(self.configs) > 1))


def step_samples(lengths: NDArray[np.int64], train: TrainConfig) -> int | None:
    """How many samples a step has that begins with these; None where they are too few to tell."""
    if train.global_batch_size:
        return train.global_batch_size if train.global_batch_size <= len(lengths) else None
    ends = np.cumsum(lengths)
    if not ends.size or ends[-1] <= train.global_batch_tokens:  # a next sample may fit
        return None
    return int(np.searchsorted(ends, train.global_batch_tokens, side="right"))
