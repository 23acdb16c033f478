"""All randomness of a run, as functions of global coordinates instead of generator state.

A random number is a hash of where it is used: seed, purpose, epoch, sample, position and so on; never a rank,
never a count of earlier draws. Every parallel layout and every resumed run therefore sees the same numbers,
and checkpoints hold no generator state. These functions are frozen: changing one changes every run.
"""

from enum import IntEnum
from math import isqrt
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scalar: TypeAlias = int | np.integer
Word: TypeAlias = Scalar | NDArray[np.integer]
HashArray: TypeAlias = NDArray[np.uint64]

_WORD_MASK = (1 << 64) - 1
# splitmix64's: the golden ratio in 64 bits, and the multipliers of its finalizer (variant 13 of Stafford's list).
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
# Four rounds make a Feistel network of random functions indistinguishable from a random permutation (Luby and
# Rackoff); small sizes have few pairs, for which twice as many are cheap.
_FEISTEL_ROUNDS = 8


class Purpose(IntEnum):
    """What a random number is for; the word after the seed. Values are part of every run and never change."""

    ORDER = 1
    """Order of the samples of an epoch."""
    COUNT = 2
    """How many tokens of a sample are masked."""
    MASK = 3
    """Which tokens of a sample are masked."""
    SAMPLE = 4
    """Noise that draws the replacement of a masked token."""
    INIT = 5
    """Initial weights."""
    DROPOUT = 6
    """Dropout."""
    VALIDATION = 7
    """Seed of evaluation: its order, masks and noise."""
    SPLIT = 8
    """Which documents are held out for evaluation."""
    READ = 9
    """What is read where a token is masked, if not always <mask>."""
    CROP = 10
    """Where the crop of a sample begins that contrastive learning compares with it."""


@overload
def hash64(*words: Scalar) -> np.uint64: ...  # type: ignore[overload-overlap]
@overload
def hash64(*words: Word) -> HashArray: ...
def hash64(*words: Word) -> np.uint64 | HashArray:
    """64 hash bits of a sequence of words: np.uint64 for scalars, else an array of the words' joint shape.

    Words are taken modulo 2**64. The finalizer of splitmix64, chained: state <- mix((state ^ word) + gamma),
    from state 0. With the words before it fixed, the hash is a bijection of the last word: no two positions
    tie.
    """
    return extend64(0, *words)


@overload
def extend64(state: Scalar, *words: Scalar) -> np.uint64: ...  # type: ignore[overload-overlap]
@overload
def extend64(state: Word, *words: Word) -> HashArray: ...
def extend64(state: Word, *words: Word) -> np.uint64 | HashArray:
    """The hash of more words after those already hashed: extend64(hash64(*a), *b) == hash64(*a, *b)."""
    for word in words:
        if np.ndim(state) == 0 and np.ndim(word) == 0:
            state = _mix_scalar(int(state) ^ int(word))
        else:
            state = _mix_array(np.bitwise_xor(_as_words(state), _as_words(word)))
    return np.uint64(int(state) & _WORD_MASK) if np.ndim(state) == 0 else _as_words(state)


@overload
def uniform(*words: Scalar) -> np.float64: ...  # type: ignore[overload-overlap]
@overload
def uniform(*words: Word) -> NDArray[np.float64]: ...
def uniform(*words: Word) -> np.float64 | NDArray[np.float64]:
    """Uniform numbers in [0, 1): the upper 53 bits of hash64(*words)."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A bijection of range(size), evaluated at any index in O(1) memory: `permutation[indices]`.

    A Feistel network over pairs (left, right) with left < ceil(sqrt(size)); the few pairs whose number is not
    below `size` are walked along their cycle until one is.
    """

    def __init__(self, size: int, *key: int):
        assert size > 0, size
        self.size = size
        self._left_size = isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)
        self._round_states = [int(hash64(*key, number)) for number in range(_FEISTEL_ROUNDS)]

    def __getitem__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Where each index goes: int64, the shape of `indices`; indices must lie in range(size)."""
        given = np.asarray(indices)
        assert given.size == 0 or (given.min() >= 0 and given.max() < self.size), self.size
        values = self._feistel(given.astype(np.uint64).reshape(-1))
        # At most ceil(sqrt(size)) pairs have no number below size, so that this loop is short.
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(given.shape)

    def _feistel(self, values: HashArray) -> HashArray:
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        left, right = np.divmod(values, right_size)
        for number, state in enumerate(self._round_states):
            # Halves of unlike size: each round adds to one half a function of the other, modulo its size; subtracting
            # would undo it, whatever the function is.
            if number % 2 == 0:
                left = (left + extend64(state, right) % left_size) % left_size
            else:
                right = (right + extend64(state, left) % right_size) % right_size
        return left * right_size + right


def _mix_scalar(word: int) -> int:
    word = (word + _GAMMA) & _WORD_MASK
    word = (word ^ (word >> 30)) * _MULTIPLIER_1 & _WORD_MASK
    word = (word ^ (word >> 27)) * _MULTIPLIER_2 & _WORD_MASK
    return word ^ (word >> 31)


def _mix_array(words: HashArray) -> HashArray:
    """_mix_scalar of every element, in place."""
    # Five passes over memory that was just made: several times faster than an expression with temporaries.
    words += np.uint64(_GAMMA)
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MULTIPLIER_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MULTIPLIER_2)
    words ^= words >> np.uint64(31)
    return words


def _as_words(value: Word) -> HashArray:
    if isinstance(value, int):
        return np.asarray(value & _WORD_MASK, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64, copy=False)
