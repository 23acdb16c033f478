"""Records to token ids, in this process or in others; chunks come out in the order they went in."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.documents import Record, Reject, is_json_lines, parse_record
from metro_megatron.data.tokenizer import Tokenizer
from metro_megatron.errors import UserError

_CHUNKS_AHEAD = 3
"""Chunks under way per worker: what bounds the memory between reader and writer."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file."""

    path: str
    text_key: str
    records: list[Record]


@dataclass(frozen=True)
class EncodedChunk:
    """Documents of a chunk as `ShardWriter.append` takes them, and what was rejected."""

    path: str
    tokens: NDArray[np.int32]
    unit_lengths: NDArray[np.int32]
    document_units: NDArray[np.int64]
    rejects: list[tuple[int, Reject]]
    """Line and reason, in order."""
    text_bytes: int


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> EncodedChunk:
    """Parse and encode the records of a chunk."""
    units: list[str] = []
    document_units: list[int] = []
    rejects: list[tuple[int, Reject]] = []
    is_json = is_json_lines(chunk.path)
    for record in chunk.records:
        document = parse_record(record.raw, is_json, chunk.text_key)
        if isinstance(document, Reject):
            rejects.append((record.line, document))
        else:
            units += document
            document_units.append(len(document))
    ids = tokenizer.encode_batch(units)
    return EncodedChunk(
        path=chunk.path,
        tokens=np.array([i for unit in ids for i in unit], dtype=np.int32),
        unit_lengths=np.array([len(unit) for unit in ids], dtype=np.int32),
        document_units=np.array(document_units, dtype=np.int64),
        rejects=rejects,
        text_bytes=sum(len(record.raw or b"") for record in chunk.records),
    )


def encode_all(chunks: Iterator[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[EncodedChunk]:
    """Every chunk encoded, in order; by `workers` processes if there are several."""
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _in_order(pool, chunks, str(tokenizer.path), _CHUNKS_AHEAD * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended unexpectedly, most likely for want of memory; nothing was written. "
            f"Lower --workers ({workers}) or --max_document_bytes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, chunks: Iterator[Chunk], folder: str, ahead: int
) -> Iterator[EncodedChunk]:
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_encode_in_worker, chunk, folder))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_in_worker(chunk: Chunk, folder: str) -> EncodedChunk:
    return encode_chunk(chunk, _load_once(folder))


_load_once: Callable[[str], Tokenizer] = cache(Tokenizer.from_folder)
