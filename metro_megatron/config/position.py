"""How attention knows where tokens stand, in whole numbers; `metro_megatron.model.position` makes tensors of them.

A learned table has a row per bucket of distances and a column per head; all layers of an encoder read it.
Legend: S positions of the longest sample, b buckets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets(ABC):
    """Which distances share a bias: none among the b/4 shortest of a side, more and more towards the longest."""

    count: int
    """b of both sides together; even."""
    max_distance: int
    """Distance in tokens from which all share the last bucket of their side."""

    @property
    def side(self) -> int:
        """Buckets of one direction."""
        return self.count // 2

    @property
    def exact(self) -> int:
        """Distances below this one have a bucket each; from here on buckets grow with the logarithm."""
        return self.side // 2

    @property
    @abstractmethod
    def unused(self) -> int:
        """The row below b that no distance reads."""

    @property
    @abstractmethod
    def least_max_distance(self) -> int:
        """The smallest max_distance for which the logarithm that `row` divides by is positive."""

    @abstractmethod
    def row(self, relative: int, positions: int) -> int:
        """Row of the table for relative = key - query in an encoder of so many positions."""


class CocoBuckets(Buckets):
    """COCO-LM's: rounded up, rows in the order of signed distances; the last row is unused."""

    @property
    def unused(self) -> int:
        return self.count - 1

    @property
    def least_max_distance(self) -> int:
        return self.exact + 2

    def row(self, relative: int, positions: int) -> int:
        # The lowest row is that of the furthest earlier key of *any* sample, so that short samples read the same rows.
        bucket = self._bucket(abs(relative))
        return self._bucket(positions - 1) + (bucket if relative > 0 else -bucket)

    def _bucket(self, distance: int) -> int:
        if distance < self.exact:
            return distance
        share = math.log(distance / self.exact) / math.log((self.max_distance - 1) / self.exact)
        return min(self.exact + math.ceil(share * (self.side - 1 - self.exact)), self.side - 1)


class T5Buckets(Buckets):
    """T5's for two directions: rounded down, later keys in the upper half, whose first row is unused."""

    @property
    def unused(self) -> int:
        return self.side

    @property
    def least_max_distance(self) -> int:
        return self.exact + 1

    def row(self, relative: int, positions: int) -> int:
        return self._bucket(abs(relative)) + (self.side if relative > 0 else 0)

    def _bucket(self, distance: int) -> int:
        if distance < self.exact:
            return distance
        share = math.log(distance / self.exact) / math.log(self.max_distance / self.exact)
        return min(self.exact + math.floor(share * (self.side - self.exact)), self.side - 1)


BUCKETS: dict[str, type[Buckets]] = {"coco": CocoBuckets, "t5": T5Buckets}
"""By model.relative_bucket."""


@dataclass(frozen=True)
class PositionScheme:
    """All that attention is told about positions. Position 0 is [CLS]."""

    positions: int
    """S."""
    buckets: Buckets | None
    """None: no relative biases."""
    resets_cls: bool = True
    """Whether [CLS] has biases of its own, as a query and as a key, whatever the distance (TUPE, METRO "reset [CLS]"):
    relative ones, and those of the untied term."""
    is_untied: bool = False
    """Whether scores have a term of absolute positions alone (full TUPE)."""
    starts_decaying: bool = False
    """Whether biases start at -2^-h times the distance in head h, not at random."""

    @property
    def num_rows(self) -> int:
        """Rows of the table; a reset needs one more than there are buckets."""
        return 0 if self.buckets is None else self.buckets.count + self.resets_cls

    @property
    def reach(self) -> int:
        """The largest distance that reads its bucket: where [CLS] is reset, distances to it do not count."""
        return self.positions - 1 - self.resets_cls

    def distance_rows(self) -> list[int]:
        """Rows for relative = key - query from -reach to reach."""
        assert self.buckets is not None
        return [self.buckets.row(relative, self.positions) for relative in range(-self.reach, self.reach + 1)]

    def cls_rows(self) -> list[int]:
        """Rows of [CLS] as the query, itself included, and as the key of all others; empty where it is not reset."""
        assert self.buckets is not None
        return [self.buckets.unused, self.buckets.count] if self.resets_cls else []

    def rows_from(self, fewer: PositionScheme) -> list[int]:
        """For each row of the table the one that says the same in a scheme that differs in having fewer positions.

        Distances beyond its reach have its furthest row of their side.
        """
        assert self.buckets is not None and fewer.buckets is not None
        found = list(range(self.num_rows))
        # From far to near, so that the nearest distance of a bucket counts.
        for relative, row in sorted(enumerate(self.distance_rows(), -self.reach), key=lambda one: -abs(one[0])):
            known = max(-fewer.reach, min(relative, fewer.reach))
            found[row] = fewer.buckets.row(known, fewer.positions)
        return found

    def start(self, num_heads: int) -> list[list[float]] | None:
        """Initial biases [num_rows, num_heads]; None: drawn as all weights are.

        The smallest distance of a bucket counts; 0 for [CLS] and for rows that nothing reads.
        """
        if not self.starts_decaying:
            return None
        smallest = [0] * self.num_rows
        # From far to near, so that the nearest stays.
        for relative, row in sorted(enumerate(self.distance_rows(), -self.reach), key=lambda one: -abs(one[0])):
            smallest[row] = abs(relative)
        return [[-distance * 2.0**-head for head in range(num_heads)] for distance in smallest]

    def problems(self) -> Iterator[str]:
        """What is wrong with the numbers, in the words of the configuration."""
        if self.buckets is None:
            if self.starts_decaying:
                yield (
                    "model.relative_bias_init is decay, but model.relative_bucket none leaves no biases to start; "
                    "use normal, or a relative_bucket of coco or t5"
                )
            return
        count, distance = self.buckets.count, self.buckets.max_distance
        if count % 2:
            yield f"model.relative_attention_num_buckets is {count}, must be even; use {count + 1}"
        if distance < self.buckets.least_max_distance:
            yield (
                f"model.relative_attention_max_distance is {distance}, must be greater than "
                f"{self.buckets.least_max_distance - 1} with model.relative_attention_num_buckets {count}; "
                "the paper uses 64 and 128"
            )
