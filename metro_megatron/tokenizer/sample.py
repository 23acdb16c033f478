"""The uniform sample of documents that a tokenizer is trained on."""

import heapq
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import numpy as np

from metro_megatron.randomness import Purpose, hash64
from metro_megatron.text.documents import SourcedDocument

_SHARE = 100
"""A document has at most one part of so many of a sample that not all text fits into."""

_HASH_BLOCK = 1024
"""Documents hashed at once, as a call of NumPy costs as much as hundreds of hashes."""


def sample_documents(documents: Iterable[SourcedDocument], sample_bytes: int, seed: int = 1) -> list[SourcedDocument]:
    """A uniform sample of the documents in their order, of at most `sample_bytes` UTF-8 bytes in memory.

    Documents are put in a random order by a hash of (seed, number), and the first of that order stay. Where not all
    fit, longer ones than a hundredth of the sample are represented by their begin, so that few books do not take the
    room of many articles. The sample is a pure function of the documents and the seed.
    """
    heap: list[tuple[int, int, int, SourcedDocument]] = []
    total, bound, number, is_full = 0, 1 << 64, 0, False
    longest = max(1, sample_bytes // _SHARE)
    iterator = iter(documents)
    while block := list(islice(iterator, _HASH_BLOCK)):
        keys = hash64(seed, Purpose.ORDER, np.arange(number, number + len(block), dtype=np.uint64))
        for key, document in zip(keys.tolist(), block, strict=True):
            number += 1
            if key >= bound:
                continue
            size, document = _begin_of(document, longest) if is_full else (_size(document), document)
            heapq.heappush(heap, (-key, number, size, document))
            total += size
            if total > sample_bytes and not is_full:
                is_full = True
                heap = [(negative, place, *_begin_of(one, longest)) for negative, place, _, one in heap]  # in order
                total = sum(size for _, _, size, _ in heap)
            while total > sample_bytes:
                negative, _, size, _ = heapq.heappop(heap)
                bound, total = -negative, total - size
    return [document for _, _, _, document in sorted(heap, key=lambda entry: entry[1])]


def _size(document: SourcedDocument) -> int:
    return sum(len(unit.encode()) for unit in document.units)


def _begin_of(document: SourcedDocument, longest: int) -> tuple[int, SourcedDocument]:
    """Bytes, at most `longest`, and what has them: a document's first units, the last of them cut where it must be."""
    room, units = longest, []
    for unit in document.units:
        content = unit.encode()[:room]
        room -= len(content)
        if kept := content.decode(errors="ignore"):
            units.append(kept)
        if not room:
            break
    return longest - room, replace(document, units=units)
