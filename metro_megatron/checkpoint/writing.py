"""A checkpoint's tensors on their way to the disk: who writes what, copied, written by threads.

Files are those of torch.distributed.checkpoint, in which megatron-core (0.16) keeps its own. Only the first plan is a
collective call.
"""

from __future__ import annotations

import io
import mmap
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from metro_megatron.checkpoint.pieces import threads_of
from metro_megatron.checkpoint.read import OPTIMIZER_PREFIX
from metro_megatron.checkpoint.sharded_state import State
from metro_megatron.checkpoint.sums import Sums

FORMAT = ("torch_dist", 1)
"""megatron-core's name and version of how tensors lie in files."""
HEAD = 1200
"""Bytes, about, that torch.save needs beside the numbers of a piece."""
OPTIMIZER_FILES = 2
"""Of one rank: as many threads sum and write them."""

Key = tuple[str, tuple[int, ...] | None]
"""Name and place of a piece; None: of what is no tensor."""


class SummedFile(io.BufferedWriter):
    """A new file that is summed while it is written, which no seek may disturb."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sums = Sums()

    def write(self, data: Any) -> int:
        self.sums.update(data)
        return super().write(data)

    def seekable(self) -> bool:
        return False


@dataclass
class Written:
    """What one rank has written, or why it could not."""

    results: list[WriteResult] = field(default_factory=list)
    """Where each of its pieces lies."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What integrity.json says of its files."""
    problem: str = ""


class ShardWriter:
    """One rank's files of one checkpoint, each written by a thread of this process.

    megatron-core's own writer forks processes. One of them that is killed, for want of memory, leaves its parent
    waiting for ever, and they need a path for their socket.
    """

    def __init__(self, folder: Path, files: dict[str, list[tuple[Key, Tensor | None]]], common: Any, metadata: Any):
        """files: what this rank writes, by name. common, metadata: what the first rank writes beside."""
        self.folder = folder
        self.files = files
        self._common = common
        self._metadata: Metadata | None = metadata

    def copy(self) -> None:
        """Take what is to be written out of the training's hands, into the host's memory."""
        devices = {tensor.device for share in self.files.values() for _, tensor in share if tensor is not None}
        with threads_of(devices, len(self.files)) as threads:
            self.files = dict(zip(self.files, threads.map(_copied, self.files.values()), strict=True))

    def write(self) -> Written:
        """Write and sum this rank's files, beside each other, and bring them to the disk."""
        written = Written()
        try:
            with ThreadPoolExecutor(max(1, len(self.files))) as threads:
                parts = list(threads.map(self._write, self.files, self.files.values()))
        except Exception as error:  # whatever it is, other ranks wait to be told
            written.problem = str(error) or repr(error)
        else:
            written.results = [result for results, _ in parts for result in results]
            written.entries = {name: entry for name, (_, entry) in zip(self.files, parts, strict=True)}
        finally:
            self.files = {}  # a copy of the state
        return written

    def finish_all(self, written: list[Written]) -> dict[str, dict[str, Any]]:
        """On the first rank, when all have written: write what says where the tensors lie. Returns all files' entries
        in integrity.json; raises RuntimeError where a rank could not write."""
        problem = next((one.problem for one in written if one.problem), "")
        if problem:
            raise RuntimeError(problem)
        torch.save(self._common, self.folder / COMMON_STATE_FNAME)
        assert self._metadata is not None
        dcp.FileSystemWriter(self.folder).finish(replace(self._metadata), [one.results for one in written])
        serialization.save_config(CheckpointingConfig(*FORMAT), str(self.folder))
        return {name: entry for one in written for name, entry in one.entries.items()}

    def _write(self, name: str, share: list[tuple[Key, Tensor | None]]) -> tuple[list[WriteResult], dict[str, Any]]:
        with SummedFile(self.folder / name) as file:
            results = [write_piece(file, name, key, tensor) for key, tensor in share]
            file.flush()
            os.fsync(file.fileno())
            return results, {"bytes": file.tell(), **file.sums.found()}


def write_piece(file: io.BufferedWriter, name: str, key: Key, tensor: Tensor | None) -> WriteResult:
    """Write one piece, or what stands for nothing, to the file of this name."""
    begin = file.tell()
    torch.save(on_host(tensor), file)
    index = MetadataIndex(key[0], None if key[1] is None else torch.Size(key[1]))
    length = file.tell() - begin
    return WriteResult(index, length, _StorageInfo(name, begin, length))


def on_host(tensor: Tensor | None) -> Tensor | None:
    """What is written: a tensor's own numbers, row by row, not all of the storage that it is a part of."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _copied(share: list[tuple[Key, Tensor | None]]) -> list[tuple[Key, Tensor | None]]:
    """In one stretch of memory, of large pages where the system has them: small ones take longer than the copy."""
    tensors = [tensor for _, tensor in share if tensor is not None]
    if not tensors:
        return share
    size = sum(_aligned(tensor.nbytes) for tensor in tensors)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    copies, begin = [], 0
    for tensor in tensors:
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        copies.append(copy.copy_(tensor.detach()))
        begin += _aligned(tensor.nbytes)
    left = iter(copies)
    return [(key, None if tensor is None else next(left)) for key, tensor in share]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


@dataclass(frozen=True)
class _Plan:
    """Who writes what, the same at every save of a run."""

    files: dict[str, list[Key]]
    """This rank's, by name."""
    metadata: Metadata
    """Of all ranks' tensors, without the places in files."""


class Planner:
    """Says what each rank writes: of what several ranks hold one writes it, such that all have about as much to do."""

    def __init__(self, group: ProcessGroup):
        """group: of all ranks."""
        self._group = group
        self._plan: _Plan | None = None

    def plan(self, state: State, folder: Path) -> ShardWriter:
        """What this rank has to write. The first call is a collective one; raises RuntimeError, on every rank, where
        the ranks' pieces do not make up their tensors."""
        own: dict[Key, Tensor | None] = {piece.key: piece.tensor for piece in state.pieces}
        own |= {(name, None): None for name in state.empty}
        if self._plan is None:
            self._plan = self._new(state)
        files = {name: [(key, own[key]) for key in keys] for name, keys in self._plan.files.items()}
        return ShardWriter(folder, files, state.common, self._plan.metadata)

    def gather(self, state: State) -> list[_Held]:
        """What each rank could write, by rank: all that a plan asks of others. A collective call."""
        everyone: list[_Held] = [_Held({}, [])] * self._group.size()
        dist.all_gather_object(everyone, _Held.of(state), group=self._group)
        return everyone

    def _new(self, state: State) -> _Plan:
        everyone = self.gather(state)
        tensors = {key: block for held in everyone for key, block in held.pieces.items()}
        sizes: dict[Key, int] = {key: HEAD + block.num_bytes for key, block in tensors.items()}
        sizes |= {(name, None): HEAD for held in everyone for name in held.empty}
        holders: dict[Key, list[int]] = defaultdict(list)
        for rank, held in enumerate(everyone):
            for key in (*held.pieces, *((name, None) for name in held.empty)):
                holders[key].append(rank)
        rank = self._group.rank()
        own = [key for key, writer in _shared_out(holders, sizes, self._group.size()).items() if writer == rank]
        names = {name for held in everyone for name in held.empty}
        return _Plan(_files(own, sizes, rank), _metadata(tensors, names))


@dataclass(frozen=True)
class _Block:
    """A piece without its numbers."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.sizes).numel()

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _Held:
    """What one rank could write."""

    pieces: dict[tuple[str, tuple[int, ...]], _Block]
    empty: list[str]

    @classmethod
    def of(cls, state: State) -> _Held:
        pieces = {one.key: _Block(one.shape, tuple(one.tensor.shape), one.tensor.dtype) for one in state.pieces}
        return cls(pieces, state.empty)


def _shared_out(holders: dict[Key, list[int]], sizes: dict[Key, int], num_ranks: int) -> dict[Key, int]:
    """The rank that writes each piece: what only one has first, then large ones, to the rank with the least."""
    loads, writers = [0] * num_ranks, {}
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key], key[0], key[1] or ())):
        rank = min(holders[key], key=lambda rank: (loads[rank], rank))
        writers[key] = rank
        loads[rank] += sizes[key]
    return writers


def _files(own: Iterable[Key], sizes: dict[Key, int], rank: int) -> dict[str, list[Key]]:
    """One for the weights of each model, so that who wants those of one reads no other, then the optimizer's."""
    weights: dict[str, list[Key]] = defaultdict(list)
    rest: list[list[Key]] = [[] for _ in range(OPTIMIZER_FILES)]
    loads = [0] * OPTIMIZER_FILES
    for key in own:  # by size
        if key[0].startswith(OPTIMIZER_PREFIX):
            least = loads.index(min(loads))
            rest[least].append(key)
            loads[least] += sizes[key]
        else:
            weights[key[0].partition(".")[0]].append(key)
    shares = [*(weights[model] for model in sorted(weights)), *filter(None, rest)]
    return {f"__{rank}_{number}.distcp": share for number, share in enumerate(shares)}


def _metadata(tensors: dict[tuple[str, tuple[int, ...]], _Block], empty: Iterable[str]) -> Metadata:
    """Raises RuntimeError where pieces do not make up their tensors."""
    chunks: dict[str, list[tuple[tuple[int, ...], _Block]]] = defaultdict(list)
    for (name, offsets), block in sorted(tensors.items(), key=lambda item: item[0]):
        chunks[name].append((offsets, block))
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in empty}
    for name, parts in chunks.items():
        shape, dtype = parts[0][1].shape, parts[0][1].dtype
        is_one = all((block.shape, block.dtype) == (shape, dtype) for _, block in parts)
        if not is_one or sum(block.numel for _, block in parts) != torch.Size(shape).numel():
            raise RuntimeError(f"the ranks' pieces do not make up {name}, {list(shape)}")
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(block.sizes)) for offsets, block in parts],
        )
    return Metadata(entries)
