"""Which tokens are masked: a pure function of (seed, epoch, sample id), never of the batch around a sample.

<s> and </s> are never chosen. What is chosen is predicted, replaced and counted, whether or not <mask> is read there:
METRO hides all of it, BERT shows some as it is or as another token. n samples, M masked positions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.order import Draws
from metro_megatron.randomness import Purpose, extend64, hash64, uniform
from metro_megatron.vocabulary import MASK_ID, NUM_SPECIALS

_CHUNK_SAMPLES = 64
"""Samples ranked together; keeps the matrix of hashes in cache and its padding small."""


@dataclass(frozen=True)
class Masking:
    """The masks, and the keys of noise and crops, of a run."""

    seed: int
    probability: float
    """Share of a sample's tokens that are masked, <s> and </s> counted in the total."""
    keep_probability: float = 0.0
    """Share of the masked positions where the token itself is read."""
    random_probability: float = 0.0
    """Share of the masked positions where a random token is read."""
    vocab_size: int = NUM_SPECIALS
    """Random tokens are all ids below it but the specials."""

    def counts(self, draws: Draws, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Masked tokens of each sample [n]: floor(probability (l + 2) + u), u uniform in [0, 1), at most l.

        `lengths` [n] are content tokens l. At l + 2 = 512 and 15%: 76 with probability 0.2, 77 with 0.8. A
        sample of few tokens may have none.
        """
        dither = uniform(self.seed, Purpose.COUNT, draws.epoch, draws.sample)
        wanted = np.floor(self.probability * (lengths + 2) + dither).astype(np.int64)
        return np.minimum(wanted, lengths)

    def positions(self, draws: Draws, lengths: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked positions: indices of their samples in `draws` [M], positions in the samples [M]; ascending.

        Positions count from <s> = 0, so content is 1 to l. Each subset of a sample's content is equally
        likely: the masked ones are those with the smallest hashes, which never tie.
        """
        counts = self.counts(draws, lengths)
        states = hash64(self.seed, Purpose.MASK, draws.epoch, draws.sample)
        by_length = np.argsort(lengths, kind="stable")
        chunks = [by_length[at : at + _CHUNK_SAMPLES] for at in range(0, len(by_length), _CHUNK_SAMPLES)]
        found = [_smallest_hashes(states[chunk], lengths[chunk], counts[chunk]) for chunk in chunks]
        nothing = np.empty(0, dtype=np.int64)
        drawn = np.concatenate([nothing, *(chunk[row] for chunk, (row, _) in zip(chunks, found, strict=True))])
        positions = np.concatenate([nothing, *(position for _, position in found)])
        # Stable: the positions of a sample are ascending already.
        ascending = np.argsort(drawn, kind="stable")
        return drawn[ascending], positions[ascending]

    def readings(self, draws: Draws, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids [M] that are read instead of tokens [M], masked at one position of each draw (BERT's 80/10/10).

        u uniform in [0, 1): the token itself below keep_probability, any but a special with equal chance below
        keep_probability + random_probability, else <mask>.
        """
        if self.keep_probability == self.random_probability == 0:
            return np.full_like(tokens, MASK_ID)
        place = (self.seed, Purpose.READ, draws.epoch, draws.sample, positions)
        u, which = uniform(*place, 0), uniform(*place, 1)
        others = NUM_SPECIALS + (which * (self.vocab_size - NUM_SPECIALS)).astype(np.int64)
        shown = self.keep_probability + self.random_probability
        return np.where(u < self.keep_probability, tokens, np.where(u < shown, others, MASK_ID))

    def crop_keys(self, draws: Draws) -> NDArray[np.int64]:
        """Where a crop of each draw [n] begins: 63 bits of a hash."""
        return (hash64(self.seed, Purpose.CROP, draws.epoch, draws.sample) >> np.uint64(1)).astype(np.int64)

    def noise_keys(self, draws: Draws, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """Keys [M, 2] of the replacement noise at one position of each draw: the two halves of a hash."""
        keys = hash64(self.seed, Purpose.SAMPLE, draws.epoch, draws.sample, positions)
        halves = np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=1)
        return halves.astype(np.uint32).view(np.int32)


def _smallest_hashes(
    states: NDArray[np.uint64], lengths: NDArray[np.integer], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, position) of the counts[row] smallest hashes among positions 1 to lengths[row] of each row."""
    positions = np.arange(1, int(lengths.max()) + 1, dtype=np.uint64)
    hashes = extend64(states[:, None], positions[None, :])
    # Padding comes last in every row, so that a threshold never reaches it: counts are at most lengths.
    hashes[positions[None, :] > lengths[:, None]] = np.iinfo(np.uint64).max
    ranked = np.sort(hashes, axis=1)
    threshold = ranked[np.arange(len(states)), counts - 1]
    is_masked = (hashes <= threshold[:, None]) & (counts > 0)[:, None]
    row, column = np.nonzero(is_masked)
    return row, column + 1
