"""Which documents are exact copies of an earlier one, in bounded memory, from their 16-byte hashes.

The range of the hashes is cut into as many equal pieces as memory asks for; each pass over the hashes looks at one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.files import whole_files
from metro_megatron.preprocess.parts import Part

DOCUMENTS_PER_PASS = 1 << 22
"""About 250 MB of memory; 60 million documents take 15 passes over 1 GB."""

_BLOCK_DOCUMENTS = 1 << 18


def find_duplicates(parts: Sequence[Part], path: Path, documents_per_pass: int = DOCUMENTS_PER_PASS) -> int:
    """Write one byte per document of all parts in order, 1 where an earlier document has its hash.

    Returns how many there are. `path` appears when it is whole.
    """
    total = sum(map(len, parts))
    passes = max(1, -(-total // documents_per_pass))
    step = -(-(1 << 64) // passes)
    count = 0
    with whole_files([path]) as (file,):
        flags = np.memmap(file, np.uint8, "w+", shape=(max(1, total),))
        for number in range(passes):
            places, keys = _in_range(parts, number * step, min((number + 1) * step, 1 << 64) - 1)
            order = np.lexsort((keys[:, 1], keys[:, 0]))
            ordered = keys[order]
            is_copy = (ordered[1:] == ordered[:-1]).all(axis=1)
            copies = places[order[1:][is_copy]]
            flags[copies] = 1
            count += len(copies)
        flags.flush()
    return count


def _in_range(parts: Sequence[Part], first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Places [n] (ascending, so that the stable sort keeps the first) and hashes [n, 2] with first <= hash <= last."""
    places, keys = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    start = 0
    for part in parts:
        for begin in range(0, len(part), _BLOCK_DOCUMENTS):
            hashes = part.document_hashes(begin, min(len(part), begin + _BLOCK_DOCUMENTS))
            chosen = np.flatnonzero((hashes[:, 0] >= np.uint64(first)) & (hashes[:, 0] <= np.uint64(last)))
            places.append(chosen + (start + begin))
            keys.append(hashes[chosen])
        start += len(part)
    return np.concatenate(places), np.concatenate(keys)
