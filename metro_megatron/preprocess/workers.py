"""Chunks given to processes of this machine; any order, as each writes a part of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.preprocess.encoding import EncodingOptions, Progress, encoder_of_process
from metro_megatron.text.inputs import Chunk

OnEntry = Callable[[Chunk, dict[str, Any]], object]
"""Called with every finished chunk and its journal entry."""
OnProgress = Callable[[Progress], object]
"""Called with what has been done since the beginning of the call, now and then."""

_FIELDS = ("bytes_read", "text_bytes", "tokens", "rejected")
_SECONDS_BETWEEN_LOOKS = 0.3


def encode_locally(
    chunks: Sequence[Chunk], options: EncodingOptions, workers: int, on_entry: OnEntry, on_progress: OnProgress
) -> None:
    """Encode all chunks with `workers` processes, this one if it is 1.

    Raises UserError if an input cannot be read or a worker was killed; finished chunks stay finished.
    """
    if workers == 1:
        _encode_here(chunks, options, on_entry, on_progress)
        return
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("q", len(_FIELDS) * workers)
    next_slot = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (counts, next_slot))
    try:
        waiting = {pool.submit(_encode_in_worker, chunk, options): chunk for chunk in chunks}
        while waiting:
            done, _ = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in done:
                on_entry(waiting.pop(future), future.result())
            on_progress(Progress(*(sum(counts[field :: len(_FIELDS)]) for field in range(len(_FIELDS)))))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended unexpectedly, most likely for want of memory; finished chunks are kept. Run the "
            f"same command again, with fewer --workers ({workers}) or a lower --max_document_bytes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_here(chunks: Sequence[Chunk], options: EncodingOptions, on_entry: OnEntry, on_progress: OnProgress) -> None:
    total = Progress()
    for chunk in chunks:
        before = total
        entry = encoder_of_process(options).encode(chunk, partial(_show_more, on_progress, before))
        total = before + Progress.of_entry(entry)
        on_entry(chunk, entry)


def _show_more(on_progress: OnProgress, before: Progress, now: Progress) -> None:
    on_progress(before + now)


class _Slot:
    """This process's place in the counts that the parent looks at."""

    def __init__(self, counts: Any, number: int):
        self._counts = counts
        self._begin = number * len(_FIELDS)
        self._base = [0] * len(_FIELDS)

    def begin_chunk(self) -> None:
        self._base = list(self._counts[self._begin : self._begin + len(_FIELDS)])

    def show(self, progress: Progress) -> None:
        for place, field in enumerate(_FIELDS):
            self._counts[self._begin + place] = self._base[place] + getattr(progress, field)


def _start_worker(counts: Any, next_slot: Any) -> None:
    """Leave Ctrl-C to the parent, end with it however it ends, and take a slot."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with next_slot:
        number = next_slot.value
        next_slot.value += 1
    _slots.append(_Slot(counts, number))


_slots: list[_Slot] = []
"""The one slot of a worker process; the pool's initializer has no other way to hand it over."""


def _encode_in_worker(chunk: Chunk, options: EncodingOptions) -> dict[str, Any]:
    slot = _slots[0]
    slot.begin_chunk()
    return encoder_of_process(options).encode(chunk, slot.show)
