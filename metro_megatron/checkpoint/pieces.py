"""Blocks of a checkpoint's tensors, read from its files straight into the tensors that want them.

A file is what torch.save wrote, one call after the other; `.metadata` says which block of which tensor lies where.
torch's own reader copies each of them three times, and has the whole of a block made for a part of it.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import BytesIO
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
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from metro_megatron.errors import UserError

READERS = 8
"""Threads of one process."""
_TAIL = 4096
"""Bytes from a block's end in which its table of contents lies."""
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""As torch.save names what holds the numbers of each format."""


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
    stored: tuple[int, ...]
    """Sizes of the block in the file."""
    dtype: torch.dtype
    begin: tuple[int, ...]
    """Where the common part begins in it."""
    target: Tensor

    def run(self, file: int) -> int:
        """Read it. Returns the number of bytes."""
        numbers = _numbers(file, self)
        if numbers is None:
            content = torch.empty(self.length, dtype=torch.uint8)
            _fill(file, self.offset, content)
            file_like = BytesIO(content.numpy().data)
            whole = torch.load(file_like, map_location="cpu", weights_only=True)
            for dim, (begin, size) in enumerate(zip(self.begin, self.target.shape, strict=True)):
                whole = whole.narrow(dim, begin, size)
            self.target.copy_(whole)
            return self.length
        strides = torch.empty(self.stored, device="meta").stride()
        sizes = self.target.shape
        first = sum(begin * stride for begin, stride in zip(self.begin, strides, strict=True))
        span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        place = numbers + first * self.dtype.itemsize
        is_straight = self.target.device.type == "cpu" and self.target.dtype == self.dtype
        if is_straight and self.target.is_contiguous() and span == self.target.numel():
            _fill(file, place, self.target)
        else:
            part = torch.empty(span, dtype=self.dtype)
            _fill(file, place, part)
            self.target.copy_(part.as_strided(sizes, strides))
        return span * self.dtype.itemsize


def _jobs(folder: Path, metadata: Metadata, pieces: list[Piece]) -> Iterator[_Job]:
    """Of the pieces of one tensor."""
    name, shape = pieces[0].name, pieces[0].shape
    entry, storage = metadata.state_dict_metadata.get(name), metadata.storage_data or {}
    if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shape:
        has = list(entry.size) if isinstance(entry, TensorStorageMetadata) else "nothing"
        raise UserError(f"{folder}: has {has} of {name}, {list(shape)} is wanted; give a checkpoint of the same model")
    stored = {chunk.offsets: tuple(chunk.sizes) for chunk in entry.chunks}
    chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape) for piece in pieces]
    items = create_read_items_for_chunk_list(name, entry, chunks)
    number_of = {chunk.offsets: number for number, chunk in enumerate(chunks)}
    found = [0] * len(pieces)
    for item in items:
        number = number_of[item.dest_index.offset]  # type: ignore[index] # pieces have offsets
        target = _narrowed(pieces[number].tensor.detach(), item)
        found[number] += target.numel()
        place = storage[item.storage_index]
        sizes = stored[item.storage_index.offset]  # type: ignore[index]
        yield _Job(
            *(place.relative_path, place.offset, place.length, sizes, entry.properties.dtype),
            begin=tuple(item.storage_offsets),
            target=target,
        )
    if found != [piece.tensor.numel() for piece in pieces]:
        raise UserError(f"{folder}: has not all of {name}; give another copy of this checkpoint, or an older one")


def _narrowed(tensor: Tensor, item: ReadItem) -> Tensor:
    for dim, (begin, size) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        tensor = tensor.narrow(dim, begin, size)
    return tensor


def _fill(file: int, offset: int, tensor: Tensor) -> None:
    """Read a contiguous tensor's bytes."""
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    while left:
        size = os.preadv(file, [left], offset)
        if not size:
            raise OSError("a checkpoint's file ends where a tensor should be")
        left, offset = left[size:], offset + size


def _read(file: int, offset: int, length: int) -> bytes:
    """A few bytes."""
    found = os.pread(file, length, offset)
    if len(found) < length:
        raise OSError("a checkpoint's file ends where a tensor should be")
    return found


def _numbers(file: int, job: _Job) -> int | None:
    """Offset in the file of a block's numbers; None: they do not lie there one after the other, as far as can be seen.

    A block is a ZIP archive whose last part lists the others: what describes the tensor, and its numbers.
    """
    begin = max(0, job.length - _TAIL)
    tail = _read(file, job.offset + begin, job.length - begin)
    *_, size, place, comment = struct.unpack("<4s4H2LH", tail[-22:])
    if tail[-22:-18] != b"PK\5\6" or comment or not begin <= place <= job.length - size:
        return None
    entries = {}
    at = place - begin
    while at < place - begin + size:
        head = struct.unpack("<4s6H3L5H2L", tail[at : at + 46])
        name_size, extra, remark = head[10:13]
        name = tail[at + 46 : at + 46 + name_size].decode()
        entries[name.partition("/")[2]] = (head[-1], head[8])  # offset of the part's own head, its size
        at += 46 + name_size + extra + remark
    if not {"data.pkl", "data/0"} <= entries.keys():
        return None
    (description, length), (numbers, num_bytes) = (
        (_content(file, job.offset + head), size) for head, size in (entries["data.pkl"], entries["data/0"])
    )
    is_plain = _describes(_read(file, description, length), job.stored, job.dtype)
    return numbers if is_plain and num_bytes == math.prod(job.stored) * job.dtype.itemsize else None


def _content(file: int, head: int) -> int:
    """Where a part of an archive begins behind its head."""
    name_size, extra = struct.unpack("<2H", _read(file, head + 26, 4))
    return head + 30 + name_size + extra


def _describes(description: bytes, sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether torch's description of a saved tensor is of one with these sizes, whose storage holds nothing else."""
    try:
        storage, offset, found, strides = _Description(BytesIO(description)).load()
    except Exception:  # anything but a plain tensor
        return False
    is_whole = offset == 0 and found == sizes and torch.empty(sizes, device="meta").stride() == strides
    return is_whole and storage[1] == dtype and storage[2] == "0"


class _Description(pickle.Unpickler):
    """Says what a tensor is made of, and makes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, sizes, strides, *others: (storage, offset, sizes, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(name)

    def persistent_load(self, saved: Any) -> Any:
        return saved
