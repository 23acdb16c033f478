"""Blocks of a checkpoint's tensors, read from its files straight into the tensors that want them.

A file is what torch.save wrote, one call after the other; `.metadata` says which block of which tensor lies where.
torch's own reader copies each of them three times, and has the whole of a block made for a part of it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from metro_megatron.checkpoint.files import INTEGRITY, compare_sums, integrity_entries, verify_integrity
from metro_megatron.checkpoint.sums import Sums, fastest
from metro_megatron.errors import UserError
from metro_megatron.files import opened

READERS = 8
"""Threads of one process."""
ENDS = 1 << 12
"""Bytes at the begin and at the end of what torch.save wrote, in which it says what is between."""
STRIDE = 1 << 22
"""Bytes that are read before they are summed, while the system reads ahead."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor of the whole run, of which this rank has the numbers, or wants them."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the block begins in it."""
    tensor: Tensor
    """The block."""

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, self.offsets


def blocks(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the blocks, in order, that elements start to end of a contiguous tensor are made of."""
    if start >= end:
        return
    if len(shape) < 2:
        yield (start,)[: len(shape)], (end - start,)[: len(shape)]
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    cut = min(end, first * row)
    yield from _in_one_row(shape, start, cut)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_one_row(shape, max(cut, last * row), end)


def _in_one_row(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    row = math.prod(shape[1:])
    index = start // row
    for offsets, sizes in blocks(shape[1:], start - index * row, end - index * row):
        yield (index, *offsets), (1, *sizes)


def files_of(metadata: Metadata, names: Iterable[str]) -> set[str]:
    """Names of the files in which some tensors lie."""
    storage = metadata.storage_data or {}
    return {
        storage[MetadataIndex(name, chunk.offsets)].relative_path
        for name in names
        if isinstance(entry := metadata.state_dict_metadata[name], TensorStorageMetadata)
        for chunk in entry.chunks
    }


@torch.no_grad()
def read_pieces(folder: Path, metadata: Metadata, wanted: Iterable[Piece], summed: Collection[str] = ()) -> None:
    """Fill the pieces' tensors, whatever blocks a checkpoint has of theirs, in whatever format.

    metadata: checked (checkpoint/files.py). summed: names of files that are compared with integrity.json by the bytes
    that are read of them; each is read once, by one thread. Raises UserError where the checkpoint has not what is
    wanted, and Damaged where such a file is not what was written: what was read of it counts for nothing.
    """
    entries = integrity_entries(folder) if summed else {}
    jobs: dict[str, list[_Job]] = {name: [] for name in summed}
    looks = _Looks()
    for job in sorted((job for pieces in _by_name(wanted) for job in _jobs(folder, metadata, pieces)), key=_place):
        jobs.setdefault(job.file, []).append(job)
    devices = {job.target.device for share in jobs.values() for job in share}
    try:
        with ExitStack() as stack, threads_of(devices, READERS) as threads:
            files = {name: stack.enter_context(opened(folder / name)).fileno() for name in jobs}
            largest_first = sorted(summed, key=lambda name: -os.fstat(files[name]).st_size)

            def read(name: str) -> dict[str, str]:
                return _Summed(files[name], fastest(entries.get(name, {}))).run(jobs[name], looks)

            sums = threads.map(read, largest_first)
            rest = [job for name, share in jobs.items() if name not in set(summed) for job in share]
            list(threads.map(lambda job: job.run(files[job.file], _fill, looks), rest))
            found = dict(zip(largest_first, sums, strict=True))
    except Exception:  # of damaged files reading may raise anything
        if (folder / INTEGRITY).is_file():
            verify_integrity(folder, jobs)
        raise
    if found:
        compare_sums(folder, found)


def threads_of(devices: Iterable[torch.device], number: int) -> ThreadPoolExecutor:
    """Threads that touch tensors on these devices, of which one at most is a GPU: by itself a thread's is the first."""
    gpus = tuple(device for device in devices if device.type == "cuda")
    if gpus:
        return ThreadPoolExecutor(max(1, number), initializer=partial(torch.cuda.set_device, gpus[0]))
    return ThreadPoolExecutor(max(1, number))


def _by_name(wanted: Iterable[Piece]) -> Iterator[list[Piece]]:
    for _, same in groupby(sorted(wanted, key=lambda piece: piece.key), key=lambda piece: piece.name):
        yield list(same)


@dataclass(frozen=True)
class _Job:
    """What is common to a block of a file and one that is wanted."""

    file: str
    offset: int
    length: int
    """In bytes, of the whole block's part of the file."""
    begin: tuple[int, ...]
    """Where the common part begins in the block."""
    target: Tensor

    def run(self, file: int, fill: Callable[[int, int, Tensor], None], looks: _Looks) -> None:
        """Read it. fill: what reads a contiguous tensor's bytes from a place in a file."""
        block, numbers = looks.look(file, self.offset, self.length)
        if numbers is None:  # a torch that reads what it then forgets
            source: Any = _Block(file, self.offset, self.length)
            self.target.copy_(self._common(torch.load(source, map_location="cpu", weights_only=True)))
            return
        part = self._common(block)
        place = self.offset + numbers + int(part.storage_offset()) * part.itemsize
        span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
        is_straight = self.target.device.type == "cpu" and self.target.dtype == part.dtype
        if is_straight and self.target.is_contiguous() and part.is_contiguous():
            fill(file, place, self.target)
        else:
            read = torch.empty(span, dtype=part.dtype)
            fill(file, place, read)
            self.target.copy_(read.as_strided(part.shape, part.stride()))

    def _common(self, block: Tensor) -> Tensor:
        return _narrowed(block, self.begin, self.target.shape)


def _jobs(folder: Path, metadata: Metadata, pieces: list[Piece]) -> Iterator[_Job]:
    """Of the pieces of one tensor."""
    name, shape = pieces[0].name, pieces[0].shape
    entry, storage = metadata.state_dict_metadata.get(name), metadata.storage_data or {}
    if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shape:
        has = list(entry.size) if isinstance(entry, TensorStorageMetadata) else "nothing"
        raise UserError(f"{folder}: has {has} of {name}, {list(shape)} is wanted; give a checkpoint of the same model")
    chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape) for piece in pieces]
    items = create_read_items_for_chunk_list(name, entry, chunks)
    number_of = {chunk.offsets: number for number, chunk in enumerate(chunks)}
    found = [0] * len(pieces)
    for item in items:
        number = number_of[item.dest_index.offset]  # type: ignore[index] # pieces have offsets
        target = _narrowed(pieces[number].tensor.detach(), item.dest_offsets, item.lengths)
        found[number] += target.numel()
        place = storage[item.storage_index]
        yield _Job(place.relative_path, place.offset, place.length, tuple(item.storage_offsets), target)
    if found != [piece.tensor.numel() for piece in pieces]:
        raise UserError(f"{folder}: has not all of {name}; give another copy of this checkpoint, or an older one")


class _Looks:
    """Where numbers lie in what torch.save wrote. torch is asked once for all blocks that begin alike, as it may take
    longer to say it than they take to be read, and keeps other threads from going on meanwhile."""

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[bytes, Tensor]]] = {}
        """By length: all that lies before the numbers, and the tensor."""

    def look(self, file: int, offset: int, length: int) -> tuple[Tensor, int | None]:
        """A block, on the device meta, and at which byte of it its numbers begin; None: torch does not say."""
        begin = os.pread(file, min(ENDS, length), offset)
        for known, tensor in self._known.get(length, ()):
            if begin.startswith(known):
                return tensor, len(known)
        block: Any = _Block(file, offset, length)
        tensor = torch.load(block, map_location="meta", weights_only=True)
        numbers = tensor.untyped_storage()._checkpoint_offset
        if numbers is not None and numbers <= len(begin):
            self._known.setdefault(length, []).append((begin[:numbers], tensor))
        return tensor, numbers


def _narrowed(tensor: Tensor, begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        tensor = tensor.narrow(dim, begin, size)
    return tensor


def _place(job: _Job) -> tuple[str, int]:
    return job.file, job.offset


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _fill(file: int, offset: int, tensor: Tensor) -> None:
    """Read a contiguous tensor's bytes."""
    left = _bytes_of(tensor)
    while left:
        size = os.preadv(file, [left], offset)
        if not size:
            raise OSError("a checkpoint's file ends where a tensor should be")
        left, offset = left[size:], offset + size


class _Summed:
    """A file that is summed from its begin to its end by what is read for tensors, and by what lies between them."""

    def __init__(self, file: int, kinds: Iterable[str]):
        self._file = file
        self._at = 0
        """What is before has been summed."""
        self._sums = Sums(kinds)

    def run(self, jobs: Iterable[_Job], looks: _Looks) -> dict[str, str]:
        """Read what the jobs want, in the order of the file. Returns the file's sums."""
        for job in jobs:
            job.run(self._file, self._fill, looks)
        self._pass_over(os.fstat(self._file).st_size)
        return self._sums.found()

    def _fill(self, file: int, offset: int, tensor: Tensor) -> None:
        self._pass_over(offset)
        if offset < self._at:  # another part of a block that was wanted before
            _fill(file, offset, tensor)
        else:
            self._read(_bytes_of(tensor))

    def _pass_over(self, end: int) -> None:
        """Sum what lies before a place."""
        scratch = memoryview(bytearray(max(0, min(STRIDE, end - self._at))))
        while self._at < end:
            self._read(scratch[: end - self._at])

    def _read(self, left: memoryview) -> None:
        """Read what comes next, and sum it."""
        while left:
            size = os.preadv(self._file, [left[:STRIDE]], self._at)
            if not size:
                raise OSError("a checkpoint's file ends where a tensor should be")
            self._at += size
            self._sums.update(left[:size])
            left = left[size:]


class _Block(io.RawIOBase):
    """A part of an open file that threads share, as a file of its own.

    Its ends, which say what is in it, are read at once: each call of the system may have a thread wait for others.
    """

    def __init__(self, file: int, offset: int, length: int):
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0
        places = (0, max(0, length - ENDS))
        self._ends = [(place, os.pread(file, min(ENDS, length), offset + place)) for place in places]

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        for begin, known in self._ends:
            if begin <= self._at and self._at + len(wanted) <= begin + len(known):
                wanted[:] = known[self._at - begin :][: len(wanted)]
                size = len(wanted)
                break
        else:
            size = os.preadv(self._file, [wanted], self._offset + self._at)
        self._at += size
        return size
