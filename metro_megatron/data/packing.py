"""Samples side by side in rows.

Documents are short: one sample per row of 512 wastes a quarter to a half of a step on padding (arXiv
2107.02027).
"""

from bisect import bisect_left, insort
from heapq import heapreplace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.config.rows import RowRule

EXCHANGING_RANKS = 8
"""On fewer, rows are those of earlier releases: recorded losses stay equal to the bit."""


def balanced(lengths: ArrayLike, rule: RowRule) -> tuple[list[NDArray[np.int64]], int]:
    """Rows of ascending indices into `lengths`, as many as `rule` says, and the length that all of them get.

    `spread` where its fullest row has at most a 128th more tokens than the mean. Else MULTIFIT (Coffman, Garey and
    Johnson 1978): of the shorter lengths, the first one in which `pack` needs no more rows is looked for by halves.
    Where that leaves a 64th more than it must, as with four samples a row, those of `spread` are `exchanged`.
    There are more rows where samples do not fit into data.micro_batch_tokens. A pure function of its arguments, so
    every rank computes the same rows. A row is empty only where there are fewer samples than rows. Lengths must lie
    in 1 to data.micro_batch_tokens.

    Measured on Wikipedia's assumed lengths, 2048 samples in 512 rows or fewer: at least 97.6% of the places hold
    tokens, in 1 to 7 ms on one core (tests/data/test_fill.py, tests/data/test_packing.py).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    longest, tokens, most = int(sizes.max()), int(sizes.sum()), rule.data.micro_batch_tokens
    assert sizes.min() > 0 and longest <= most, (longest, most)
    count, _ = rule.first_try(tokens, len(sizes), longest)
    while True:
        rows, mean = spread(sizes, count), -(-tokens // count)
        fullest = _fullest(rows, sizes)
        if fullest <= min(mean + mean // 128, most):
            return rows, rule.row_length(fullest)
        shorter = rule.row_lengths(max(longest, mean), fullest)
        tried = _Tries(sizes)
        first = bisect_left(shorter, True, key=lambda length: len(tried[length]) <= count)
        if first < len(shorter):
            found = _divided(tried[shorter[first]], count), shorter[first]
            break
        if fullest <= most:
            found = rows, rule.row_length(fullest)
            break
        count = rule.num_rows(max(len(tried[most]), count + 1), len(sizes))
    enough = rule.row_length(max(longest, mean))
    if rule.dp_size < EXCHANGING_RANKS or found[1] <= enough + enough // 64:
        return found
    rows = exchanged(rows, sizes, enough)
    return min(found, (rows, rule.row_length(_fullest(rows, sizes))), key=lambda one: one[1])


def _fullest(rows: list[NDArray[np.int64]], sizes: NDArray[np.int64]) -> int:
    return max(int(sizes[row].sum()) for row in rows)


class _Tries(dict[int, list[NDArray[np.int64]]]):
    """Rows of `pack` by their capacity, each packed once."""

    def __init__(self, sizes: NDArray[np.int64]):
        self.sizes = sizes

    def __missing__(self, capacity: int) -> list[NDArray[np.int64]]:
        self[capacity] = pack(self.sizes, capacity)
        return self[capacity]


def _divided(rows: list[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    """As many as count: rows of most samples are divided in two."""
    while len(rows) < count:
        row = rows.pop(max(range(len(rows)), key=lambda number: len(rows[number])))
        rows += [row[::2], row[1::2]]
    return rows


def spread(sizes: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """The longest first (ties: the first first), each into the emptiest of `count` rows (ties: the oldest row).

    Every row gets its share of long samples, so that attention costs ranks the same.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for index in np.argsort(-sizes, kind="stable").tolist():
        tokens, row = filled[0]
        rows[row].append(index)
        heapreplace(filled, (tokens + int(sizes[index]), row))
    return [np.sort(np.asarray(row, dtype=np.int64)) for row in rows]


def exchanged(rows: list[NDArray[np.int64]], sizes: NDArray[np.int64], enough: int) -> list[NDArray[np.int64]]:
    """The same samples in rows of which the fullest has `enough` tokens at most, or as few as this finds.

    Again and again the fullest row (ties: the first) gives a sample to a row, for one of its samples or none: whatever
    leaves the fuller of these two least full. That is 0/1-interchange (Finn and Horowitz 1979), which only asks the
    emptiest row. No row gives its last sample away.
    """
    samples = np.full((len(rows), max(map(len, rows)) + 1), -1)
    for number, row in enumerate(rows):
        samples[number, : len(row)] = row
    tokens = np.append(sizes, 0)[samples]  # a place without a sample changes hands like a sample without tokens
    filled = tokens.sum(1)
    while (most := int(filled.max())) > enough:
        giver = int(filled.argmax())
        less = tokens[giver][:, None, None] - tokens
        fuller = np.maximum(most - less, filled[:, None] + less)
        given, taker, taken = np.unravel_index(fuller.argmin(), fuller.shape)
        if fuller[given, taker, taken] >= most:
            break
        for table in (samples, tokens):
            table[giver, given], table[taker, taken] = table[taker, taken], table[giver, given]
        filled[[giver, taker]] = tokens[[giver, taker]].sum(1)
    return [np.sort(row[row >= 0]) for row in samples]


def pack(sizes: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Best fit decreasing: as few rows as it can, whose sizes add up to `capacity` at most.

    The longest first (ties: the first first), each into the fullest row that has room (ties: the oldest row),
    else into a new one. Leaves less room than `spread` where a row holds few samples.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        # `room` is sorted by (free tokens, row): the first entry at or behind (size, -1) is the fullest row that fits,
        # and the oldest of those.
        fit = bisect_left(room, (size, -1))
        left, row = room.pop(fit) if fit < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - size, row))
    return [np.sort(np.asarray(row, dtype=np.int64)) for row in rows]
