"""The order in which samples are seen: a pure function of the global position, the same for every layout.

Position g counts the samples of the whole run from 0. The blend names a source and how many samples of it come before,
g'; epoch g' // n of a source of n samples is a keyed permutation of them. A phase has an order of its own, which counts
on where the one before it ends.
"""

from dataclasses import dataclass, replace

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
    begin: int = 0
    """Global position of its first sample."""
    drawn: tuple[int, ...] = ()
    """How many samples of each source come before it; (): none."""

    def __getitem__(self, positions: ArrayLike) -> Draws:
        """The draws at global positions [n], which are unbounded above."""
        source, before = self.blend.draw(np.asarray(positions, dtype=np.int64) - self.begin)
        if self.drawn:
            before = before + np.asarray(self.drawn)[source]
        bounds = np.asarray(self.source_bounds)
        epoch, within = np.divmod(before, np.diff(bounds)[source])
        sample = np.empty_like(within)
        for number, passes in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            size = self.source_bounds[number + 1] - self.source_bounds[number]
            permutation = Permutation(size, self.seed, Purpose.ORDER, passes)
            is_here = (source == number) & (epoch == passes)
            sample[is_here] = bounds[number] + permutation[within[is_here]]
        return Draws(epoch, sample)

    def drawn_before(self, position: int) -> tuple[int, ...]:
        """How many samples of each source come before a global position, earlier phases of this length included."""
        counts = self.blend.counts(position - self.begin)
        return tuple(sum(pair) for pair in zip(counts, self.drawn or [0] * len(counts), strict=True))

    def continued(self, position: int, blend: Blend) -> "SampleOrder":
        """The order of a phase of the same samples from a global position on: each source goes on where it stands."""
        if blend == self.blend:
            return self
        return replace(self, blend=blend, begin=position, drawn=self.drawn_before(position))

    def cut_anew(self, position: int, blend: Blend, source_bounds: tuple[int, ...]) -> "SampleOrder":
        """The order of a phase of other samples of the same sources: each begins its next epoch.

        So no order, mask or noise of an earlier phase comes again, though the two cut the same text.
        """
        sizes, drawn = np.diff(self.source_bounds).tolist(), self.drawn_before(position)
        epochs = [-(-count // size) if size else 0 for count, size in zip(drawn, sizes, strict=True)]
        begun = zip(epochs, np.diff(source_bounds).tolist(), strict=True)
        return SampleOrder(source_bounds, blend, self.seed, position, tuple(epoch * size for epoch, size in begun))
