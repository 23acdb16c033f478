"""Chunks given to processes of this machine or of a Ray cluster; in any order, as each becomes a part of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from multiprocessing import connection
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.preprocess.encoding import EncodingOptions, WorkDone, encoder_of_process
from metro_megatron.preprocess.journal import ChunkEntry
from metro_megatron.text.inputs import Chunk

OnEntry = Callable[[Chunk, ChunkEntry], object]
"""Called with every finished chunk and its journal entry."""
OnProgress = Callable[[WorkDone], object]
"""Called with what has been done since the beginning of the call, now and then."""

_NUM_FIELDS = len(astuple(WorkDone()))
_SECONDS_BETWEEN_LOOKS = 0.3

_RETRIES = 3
"""Of a Ray task whose node or process died; a part has its own temporary name each time."""


def encode_locally(
    chunks: Sequence[Chunk], options: EncodingOptions, workers: int, on_entry: OnEntry, on_progress: OnProgress
) -> None:
    """Encode all chunks with `workers` processes, this one if it is 1.

    Raises UserError if an input cannot be read or a worker was killed; finished chunks stay finished.
    """
    if workers == 1:
        _encode_here(chunks, options, on_entry, on_progress)
        return
    # spawn: a forked worker would inherit locks that other threads of this process hold.
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("q", _NUM_FIELDS * workers)
    next_slot = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (counts, next_slot))
    try:
        waiting = {pool.submit(_encode_in_worker, chunk, options): chunk for chunk in chunks}
        while waiting:
            done, _ = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in done:
                on_entry(waiting.pop(future), future.result())
            on_progress(WorkDone(*(sum(counts[number::_NUM_FIELDS]) for number in range(_NUM_FIELDS))))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended unexpectedly, most likely for want of memory; finished chunks are kept. Run the "
            f"same command again, with fewer --workers ({workers}) or a lower --max_document_bytes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_here(chunks: Sequence[Chunk], options: EncodingOptions, on_entry: OnEntry, on_progress: OnProgress) -> None:
    total = WorkDone()
    for chunk in chunks:

        def show(now: WorkDone, before: WorkDone = total) -> None:
            on_progress(before + now)

        entry = encoder_of_process(options).encode(chunk, show)
        total += WorkDone.of_entry(entry)
        on_entry(chunk, entry)


class _Slot:
    """This process's counts in the array that the parent looks at: what it has done in all chunks so far."""

    def __init__(self, counts: Any, number: int):
        self._counts = counts
        self._slice = slice(number * _NUM_FIELDS, (number + 1) * _NUM_FIELDS)
        self._before = WorkDone()

    def begin_chunk(self) -> None:
        self._before = WorkDone(*self._counts[self._slice])

    def show(self, now: WorkDone) -> None:
        self._counts[self._slice] = astuple(self._before + now)


def _start_worker(counts: Any, next_slot: Any) -> None:
    """Leave Ctrl-C to the parent, end with it however it ends, and take a slot."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread
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


def _encode_in_worker(chunk: Chunk, options: EncodingOptions) -> ChunkEntry:
    slot = _slots[0]
    slot.begin_chunk()
    return encoder_of_process(options).encode(chunk, slot.show)


def encode_on_ray(
    chunks: Sequence[Chunk], options: EncodingOptions, on_entry: OnEntry, on_progress: OnProgress
) -> None:
    """Encode all chunks on the cluster that RAY_ADDRESS names, or on one that is started here.

    Its nodes share the file system of inputs and output. Raises UserError if ray is not installed, the cluster cannot
    be reached, or a task failed for good; finished chunks stay finished.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine_cluster ray needs ray; pip install 'metro_megatron[ray]'") from error
    try:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS ({error}); start it with ray start --head") from error
    try:
        encode = ray.remote(num_cpus=1, max_retries=_RETRIES)(_encode_on_node)
        waiting = {encode.remote(chunk, options): chunk for chunk in chunks}
        total = WorkDone()
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            entry = ray.get(done)
            on_entry(waiting.pop(done), entry)
            total += WorkDone.of_entry(entry)
            on_progress(total)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(f"the Ray cluster lost a task ({error}); finished chunks are kept, run again") from error
    finally:
        ray.shutdown()


def _encode_on_node(chunk: Chunk, options: EncodingOptions) -> ChunkEntry:
    return encoder_of_process(options).encode(chunk, lambda progress: None)
