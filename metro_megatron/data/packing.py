"""Samples side by side in rows of constant length.

Documents are short: one sample per row of 512 wastes a quarter to a half of a step on padding (arXiv
2107.02027).
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pack(lengths: ArrayLike, capacity: int) -> list[NDArray[np.int64]]:
    """Best fit decreasing: rows of ascending indices into `lengths`, whose lengths add up to `capacity` at most.

    The longest first (ties: the first first), each into the fullest row that has room (ties: the oldest row),
    else into a new one. A pure function of its arguments, so every rank computes the same rows. All of a step
    is packed at once; lengths must lie in 1 to `capacity`.

    Measured on Wikipedia's assumed lengths, 2048 samples: all rows but the last waste 1.9% of 512 tokens,
    0.12% of 2048, 0.002% of 16384 (tests/data/test_packing.py).
    """
    sizes = np.asarray(lengths)
    assert sizes.size == 0 or (sizes.min() > 0 and sizes.max() <= capacity), (sizes.max(), capacity)
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


def pack_prefix(lengths: ArrayLike, capacity: int, num_rows: int) -> list[NDArray[np.int64]]:
    """`pack` of as many of the first lengths as fit into `num_rows` rows; all rows together hold indices 0 to n - 1.

    From the end, as many are left out as lie in the rows too many, until none is too many: what n is, is a pure
    function of the arguments.
    """
    sizes = np.asarray(lengths)
    count = int(np.searchsorted(np.cumsum(sizes), capacity * num_rows, side="right"))
    while len(rows := pack(sizes[:count], capacity)) > num_rows:
        count -= sum(map(len, rows[num_rows:]))
    return rows
