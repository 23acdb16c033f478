"""Which tokens are masked: a pure function of (seed, epoch, sample id), never of the batch around a sample.

<s> and </s> are never chosen, and other special ids in the text last of all; with whole words, no word is
chosen in part. What is chosen is predicted, replaced and counted, whether or not <mask> is read there:
METRO hides all of it, BERT shows some as it is or as another token. n samples, M masked positions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.order import Draws
from metro_megatron.randomness import Purpose, extend64, hash64, uniform
from metro_megatron.vocabulary import NUM_SPECIALS, TRAINED_IDS, SpecialIds

_PADDING = np.uint64(np.iinfo(np.uint64).max)
_CHUNK_SAMPLES = 64
"""Samples ranked together; keeps the matrix of hashes in cache and its padding small."""


class Cells(NamedTuple):
    """The ids of samples, wherever they lie in one array."""

    ids: NDArray[np.int64]
    begins: NDArray[np.int64]
    """[n] where the <s> of each is."""

    def content(self, samples: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """[samples, length] from position 1 on; behind the end of a sample anything."""
        places = self.begins[samples][:, None] + np.arange(1, length + 1)
        return self.ids[places.clip(max=len(self.ids) - 1)]


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
    special_ids: SpecialIds = TRAINED_IDS
    word_starts: NDArray[np.bool_] | None = None
    """[V] whether an id begins a word, whose tokens are masked together; None: each token is chosen by itself."""

    def counts(self, draws: Draws, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Masked tokens of each sample [n]: floor(probability (l + 2) + u), u uniform in [0, 1), at most l.

        `lengths` [n] are content tokens l. At l + 2 = 512 and 15%: 76 with probability 0.2, 77 with 0.8. A
        sample of few tokens may have none.
        """
        dither = uniform(self.seed, Purpose.COUNT, draws.epoch, draws.sample)
        wanted = np.floor(self.probability * (lengths + 2) + dither).astype(np.int64)
        return np.minimum(wanted, lengths)

    def positions(
        self, draws: Draws, lengths: NDArray[np.integer], cells: Cells | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked positions: indices of their samples in `draws` [M], positions in the samples [M]; ascending.

        Positions count from <s> = 0, so content is 1 to l. Each subset of a sample's tokens is equally likely: the
        masked ones are those with the smallest hashes, which never tie. Special ids in the text, such as that of
        unknown words, have larger ones: they are masked only where a sample has too few others. cells: the samples'
        ids; without them no token is special. Of whole words, which need them, the hash of the first token counts, and
        a word that does not fit into what is left of `counts` is passed over (BERT's whole word masking).
        """
        if cells is not None and self.word_starts is None and not np.isin(cells.ids, self.special_ids.others).any():
            cells = None  # nearly always, and then hashes alone decide
        counts = self.counts(draws, lengths)
        states = hash64(self.seed, Purpose.MASK, draws.epoch, draws.sample)
        by_length = np.argsort(lengths, kind="stable")
        chunks = [by_length[at : at + _CHUNK_SAMPLES] for at in range(0, len(by_length), _CHUNK_SAMPLES)]
        found = [self._chosen(states[chunk], lengths[chunk], counts[chunk], cells, chunk) for chunk in chunks]
        nothing = np.empty(0, dtype=np.int64)
        drawn = np.concatenate([nothing, *(chunk[row] for chunk, (row, _) in zip(chunks, found, strict=True))])
        positions = np.concatenate([nothing, *(position for _, position in found)])
        # Stable: the positions of a sample are ascending already.
        ascending = np.argsort(drawn, kind="stable")
        return drawn[ascending], positions[ascending]

    def _chosen(
        self,
        states: NDArray[np.uint64],
        lengths: NDArray[np.integer],
        counts: NDArray[np.int64],
        cells: Cells | None,
        samples: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(row, position) of what is masked in each row, one of the samples of cells."""
        hashes = _hashes(states, lengths)
        if cells is None:
            assert self.word_starts is None
            return _smallest_hashes(hashes, counts)
        is_content = hashes != _PADDING
        ids = cells.content(samples, hashes.shape[1])
        places = np.arange(hashes.shape[1], 0, -1, dtype=np.uint64)
        hashes = np.where(is_content & np.isin(ids, self.special_ids.others), _PADDING - places, hashes)
        if self.word_starts is None:
            return _smallest_hashes(hashes, counts)
        is_start = self.word_starts[ids]
        is_start[:, 0] = True
        return _whole_words(hashes, is_start & is_content, lengths, counts)

    def readings(self, draws: Draws, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids [M] that are read instead of tokens [M], masked at one position of each draw (BERT's 80/10/10).

        u uniform in [0, 1): the token itself below keep_probability, any but a special with equal chance below
        keep_probability + random_probability, else <mask>.
        """
        if self.keep_probability == self.random_probability == 0:
            return np.full_like(tokens, self.special_ids.mask)
        place = (self.seed, Purpose.READ, draws.epoch, draws.sample, positions)
        u, which = uniform(*place, 0), uniform(*place, 1)
        others = self.special_ids.word((which * self.special_ids.num_words(self.vocab_size)).astype(np.int64))
        shown = self.keep_probability + self.random_probability
        return np.where(u < self.keep_probability, tokens, np.where(u < shown, others, self.special_ids.mask))

    def crop_keys(self, draws: Draws) -> NDArray[np.int64]:
        """Where a crop of each draw [n] begins: 63 bits of a hash."""
        return (hash64(self.seed, Purpose.CROP, draws.epoch, draws.sample) >> np.uint64(1)).astype(np.int64)

    def noise_keys(self, draws: Draws, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """Keys [M, 2] of the replacement noise at one position of each draw: the two halves of a hash."""
        keys = hash64(self.seed, Purpose.SAMPLE, draws.epoch, draws.sample, positions)
        halves = np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=1)
        return halves.astype(np.uint32).view(np.int32)


def _hashes(states: NDArray[np.uint64], lengths: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Of positions 1 to the longest of lengths of each row; a row's padding comes last."""
    positions = np.arange(1, int(lengths.max()) + 1, dtype=np.uint64)
    hashes = extend64(states[:, None], positions[None, :])
    # A threshold never reaches padding: counts are at most lengths.
    hashes[positions[None, :] > lengths[:, None]] = _PADDING
    return hashes


def _smallest_hashes(
    hashes: NDArray[np.uint64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, position) of the counts[row] smallest hashes of each row; the first is at position 1."""
    ranked = np.sort(hashes, axis=1)
    threshold = ranked[np.arange(len(hashes)), counts - 1]
    is_masked = (hashes <= threshold[:, None]) & (counts > 0)[:, None]
    row, column = np.nonzero(is_masked)
    return row, column + 1


def _whole_words(
    hashes: NDArray[np.uint64],
    is_start: NDArray[np.bool_],
    lengths: NDArray[np.integer],
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, position) of words in the order of their first tokens' hashes, as many as fit into counts[row]."""
    rows: list[int] = []
    positions: list[int] = []
    for row, left in enumerate(counts.tolist()):
        begins = np.flatnonzero(is_start[row])
        sizes = np.diff(begins, append=lengths[row])
        order = np.argsort(hashes[row, begins])
        for begin, size in zip(begins[order].tolist(), sizes[order].tolist(), strict=True):
            if not left:
                break
            if size <= left:
                left -= size
                rows += [row] * size
                positions += range(begin + 1, begin + size + 1)
    ascending = np.lexsort((positions, rows))
    return np.array(rows, np.int64)[ascending], np.array(positions, np.int64)[ascending]
