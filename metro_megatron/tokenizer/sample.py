"""The uniform sample of documents that a tokenizer is trained on."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from metro_megatron.randomness import Purpose, hash64
from metro_megatron.text.documents import CHUNK_BYTES, ChunkReader, ReadOptions, Reject, parse_record
from metro_megatron.text.inputs import InputFile, plan_chunks

_HASH_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class SourcedDocument:
    """A document's units, and the name of its source ("" where none was given)."""

    units: list[str]
    source: str = ""


def read_sourced_documents(
    files: Sequence[InputFile],
    options: ReadOptions,
    rejects: Counter[Reject],
    on_progress: Callable[[int], object],
) -> Iterator[SourcedDocument]:
    """All documents of the files in order; rejects are counted into `rejects`.

    `on_progress` hears how many bytes of the files are read. Raises UserError if a file cannot be read.
    """
    finished = 0
    for chunk in plan_chunks(files, CHUNK_BYTES):
        reader = ChunkReader(chunk, options)
        for record in reader:
            units = parse_record(record, options)
            if isinstance(units, Reject):
                rejects[units] += 1
            else:
                on_progress(finished + reader.bytes_read)
                yield SourcedDocument(units, chunk.file.source)
        finished += reader.bytes_read


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
