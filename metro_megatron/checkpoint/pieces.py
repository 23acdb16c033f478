"""Blocks of a checkpoint's tensors, read from its files straight into the tensors that want them.

A file is what torch.save wrote, one call after the other; `.metadata` says which block of which tensor lies where.
torch's own reader copies each of them three times, and has the whole of a block made for a part of it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from metro_megatron.errors import UserError

READERS = 8
"""Threads of one process."""


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
def read_pieces(
    folder: Path, metadata: Metadata, wanted: Iterable[Piece], on_bytes: Callable[[int], object] = lambda size: None
) -> None:
    """Fill the pieces' tensors, whatever blocks a checkpoint has of theirs, in whatever format.

    metadata: checked (checkpoint/files.py), as the files are. on_bytes hears of what is read. Raises UserError where
    the checkpoint has not what is wanted.
    """
    jobs = [job for pieces in _by_name(wanted) for job in _jobs(folder, metadata, pieces)]
    jobs.sort(key=lambda job: (job.file, job.offset))
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb")).fileno() for name in {job.file for job in jobs}}
        with threads_of({job.target.device for job in jobs}, READERS) as threads:
            for size in threads.map(lambda job: job.run(files[job.file]), jobs):
                on_bytes(size)


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

    def run(self, file: int) -> int:
        """Read it. Returns the number of bytes."""
        block: Any = _Block(file, self.offset, self.length)
        part = self._common(torch.load(block, map_location="meta", weights_only=True))
        numbers = part.untyped_storage()._checkpoint_offset
        if numbers is None:  # a torch that reads what it then forgets
            block.seek(0)
            self.target.copy_(self._common(torch.load(block, map_location="cpu", weights_only=True)))
            return self.length
        place = self.offset + numbers + int(part.storage_offset()) * part.itemsize
        span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
        is_straight = self.target.device.type == "cpu" and self.target.dtype == part.dtype
        if is_straight and self.target.is_contiguous() and part.is_contiguous():
            _fill(file, place, self.target)
        else:
            read = torch.empty(span, dtype=part.dtype)
            _fill(file, place, read)
            self.target.copy_(read.as_strided(part.shape, part.stride()))
        return span * part.itemsize

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


def _narrowed(tensor: Tensor, begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        tensor = tensor.narrow(dim, begin, size)
    return tensor


def _fill(file: int, offset: int, tensor: Tensor) -> None:
    """Read a contiguous tensor's bytes."""
    left = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
    while left:
        size = os.preadv(file, [left], offset)
        if not size:
            raise OSError("a checkpoint's file ends where a tensor should be")
        left, offset = left[size:], offset + size


class _Block(io.RawIOBase):
    """A part of an open file that threads share, as a file of its own."""

    def __init__(self, file: int, offset: int, length: int):
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        size = os.preadv(self._file, [wanted], self._offset + self._at)
        self._at += size
        return size
