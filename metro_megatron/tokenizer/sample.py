"""The uniform sample of documents that a tokenizer is trained on."""

import heapq
from collections.abc import Iterable
from itertools import islice

import numpy as np

from metro_megatron.randomness import Purpose, hash64
from metro_megatron.text.documents import SourcedDocument

_HASH_BLOCK = 1024
"""Documents hashed at once, as a call of NumPy costs as much as hundreds of hashes."""


def sample_documents(documents: Iterable[SourcedDocument], sample_bytes: int, seed: int = 1) -> list[SourcedDocument]:
    """A uniform sample of the documents in their order, of at most `sample_bytes` UTF-8 bytes in memory.

    Documents are put in a random order by a hash of (seed, number), and the first of that order stay. The
    sample is a pure function of the documents and the seed.
    """
    heap: list[tuple[int, int, int, SourcedDocument]] = []
    total, bound, number = 0, 1 << 64, 0
    iterator = iter(documents)
    while block := list(islice(iterator, _HASH_BLOCK)):
        keys = hash64(seed, Purpose.ORDER, np.arange(number, number + len(block), dtype=np.uint64))
        for key, document in zip(keys.tolist(), block, strict=True):
            number += 1
            if key >= bound:
                continue
            size = sum(len(unit.encode()) for unit in document.units)
            heapq.heappush(heap, (-key, number, size, document))
            total += size
            while total > sample_bytes:
                negative, _, size, _ = heapq.heappop(heap)
                bound, total = -negative, total - size
    return [document for _, _, _, document in sorted(heap, key=lambda entry: entry[1])]
