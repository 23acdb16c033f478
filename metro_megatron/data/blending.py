"""From which source the sample at a global position comes: exact proportions at every prefix, in O(1) memory.

Sources have integer weights w_0 ... w_{k-1} that sum to W. Of the first g positions the first source gets
floor(g w_0 / W), of the rest the second floor(rest w_1 / (W - w_0)), and so on. Every W positions each source has
had exactly its weight, and no source is ever k or more samples away from its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.errors import UserError

_RESOLUTION = 1 << 24
"""Weights that are not sizes are rounded to multiples of 1 / _RESOLUTION."""

_DIGIT_BITS = 20
"""A count below 2**41 times a digit, and a rest shifted by one, add up below 2**63."""


def source_weights(
    weights: Sequence[float], sizes: Sequence[int], name: str = "data.weights", may_rest: bool = False
) -> tuple[int, ...]:
    """Integer weights in proportion to `weights`, or to the sources' sizes in samples if there are none.

    Raises UserError, which calls them `name`, if there are not as many weights as sources, or one is not positive;
    with may_rest some may be 0.
    """
    if not weights:
        return tuple(sizes)
    problems = []
    if len(weights) != len(sizes):
        problems.append(f"{name} has {len(weights)} numbers for {len(sizes)} datasets; give as many")
    for number, weight in enumerate(weights):
        if not 0 < weight < np.inf and not (may_rest and weight == 0):
            limit = "not negative" if may_rest else "positive"
            problems.append(f"{name} has {weight:g} at place {number}; each must be {limit} and finite")
    if may_rest and not any(weights):
        problems.append(f"{name} are all 0; give a source that comes a positive one")
    empty = [number for number, (weight, size) in enumerate(zip(weights, sizes, strict=False)) if weight and not size]
    problems += [f"dataset {number} of data.train has no samples, but a weight" for number in empty]
    if problems:
        raise UserError(problems)
    # Only where the sum is infinite: rounded otherwise, a run that goes on would have another order.
    scale = 1.0 if np.isfinite(sum(weights)) else max(weights)
    shares = [weight / scale for weight in weights]
    return tuple(
        max(1, round(share / sum(shares) * _RESOLUTION)) if weight else 0
        for weight, share in zip(weights, shares, strict=True)
    )


@dataclass(frozen=True)
class Blend:
    """Sources with integer weights, whose sum is below 2**41; those of weight 0 never come."""

    weights: tuple[int, ...]

    def draw(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source [n] of each position [n], and how many samples of that source come before it [n]."""
        rest = np.asarray(positions, dtype=np.int64)
        source = np.zeros_like(rest)
        earlier = np.zeros_like(rest)
        is_open = np.ones(rest.shape, np.bool_)
        total = sum(self.weights)
        assert total < 1 << (2 * _DIGIT_BITS + 1), total
        for number, weight in enumerate(self.weights):
            if weight == 0:
                continue
            before, after = (_share(rest + step, weight, total) for step in (0, 1))
            is_here = is_open & (after > before)
            source[is_here], earlier[is_here] = number, before[is_here]
            is_open &= ~is_here
            rest = rest - before
            total -= weight
        assert not is_open.any()
        return source, earlier

    def counts(self, positions: int) -> tuple[int, ...]:
        """How many of the first `positions` samples come from each source."""
        rest, total, found = positions, sum(self.weights), []
        for weight in self.weights:
            found.append(rest * weight // total if weight else 0)
            rest -= found[-1]
            total -= weight
        return tuple(found)


def _share(count: NDArray[np.int64], weight: int, total: int) -> NDArray[np.int64]:
    """floor(count * weight / total) without leaving 64 bits: by long division, the weight in two digits."""
    whole, part = np.divmod(count, total)
    high, low = divmod(weight, 1 << _DIGIT_BITS)
    quotient, rest = np.divmod(part * high, total)
    return whole * weight + (quotient << _DIGIT_BITS) + ((rest << _DIGIT_BITS) + part * low) // total
