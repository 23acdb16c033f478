"""The order in which samples are seen: a pure function of the global position, the same for every layout.

Position g counts the samples of the whole run from 0; epoch g // n is a keyed permutation of all n samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.randomness import Permutation, Purpose


@dataclass(frozen=True)
class Draws:
    """Samples drawn at some positions: what every mask and every noise key is computed from."""

    epoch: NDArray[np.int64]
    """[n] pass over the data, from 0."""
    sample: NDArray[np.int64]
    """[n] sample id."""

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, places: NDArray[np.integer]) -> "Draws":
        return Draws(self.epoch[places], self.sample[places])


@dataclass(frozen=True)
class SampleOrder:
    """Every sample once per epoch, each epoch in its own random order."""

    num_samples: int
    seed: int

    def __getitem__(self, positions: ArrayLike) -> Draws:
        """The draws at global positions [n], which are unbounded above."""
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        sample = np.empty_like(place)
        for number in np.unique(epoch):
            permutation = Permutation(self.num_samples, self.seed, Purpose.ORDER, int(number))
            is_here = epoch == number
            sample[is_here] = permutation[place[is_here]]
        return Draws(epoch, sample)
