"""The order in which samples are seen: a pure function of the global position, the same for every layout.

Position g counts the samples of the whole run from 0. The blend names a source and how many samples of it come before,
g'; epoch g' // n of a source of n samples is a keyed permutation of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.data.blending import Blend
from metro_megatron.randomness import Permutation, Purpose


@dataclass(frozen=True)
class Draws:
    """Samples drawn at some positions: what every mask and every noise key is computed from."""

    epoch: NDArray[np.int64]
    """[n] pass over the sample's source, from 0."""
    sample: NDArray[np.int64]
    """[n] sample id."""

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, indices: NDArray[np.integer]) -> "Draws":
        return Draws(self.epoch[indices], self.sample[indices])


@dataclass(frozen=True)
class SampleOrder:
    """Every sample of a source once per epoch of the source, each epoch in its own random order."""

    source_bounds: tuple[int, ...]
    """Source k has samples source_bounds[k] to source_bounds[k + 1]."""
    blend: Blend
    seed: int

    def __getitem__(self, positions: ArrayLike) -> Draws:
        """The draws at global positions [n], which are unbounded above."""
        source, before = self.blend.draw(positions)
        bounds = np.asarray(self.source_bounds)
        epoch, within = np.divmod(before, np.diff(bounds)[source])
        sample = np.empty_like(within)
        for number, passes in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            size = self.source_bounds[number + 1] - self.source_bounds[number]
            permutation = Permutation(size, self.seed, Purpose.ORDER, passes)
            is_here = (source == number) & (epoch == passes)
            sample[is_here] = bounds[number] + permutation[within[is_here]]
        return Draws(epoch, sample)
