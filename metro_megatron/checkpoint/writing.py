"""A checkpoint's tensors on their way to the disk: planned by megatron-core (0.16), copied, written by threads.

Only the plan is a collective call.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

FORMAT = ("torch_dist", 1)
"""megatron-core's name and version of how tensors lie in files."""


class HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written, which no seek may disturb."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
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


class ShardWriter(filesystem_async.FileSystemWriterAsync):
    """One rank's files of one checkpoint, each written by a thread of this process.

    megatron-core's own writer forks processes. One of them that is killed, for want of memory, leaves its parent
    waiting for ever, and they need a path for their socket.
    """

    files: list[tuple[str, list[tuple[WriteItem, Any]]]]
    metadata: Metadata | None
    """On the first rank: of all ranks' tensors, without the places in files."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Touches no storage: the folder is there; a rank that failed here would leave others in a collective."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called at the end of the plan."""
        shares = filesystem_async._split_by_size_and_type(self.thread_count, plan.items)
        self.files = [
            (f"{plan.storage_data.prefix}{number}.distcp", [(item, planner.resolve_data(item)) for item in share])
            for number, share in enumerate(filter(None, shares))
        ]

    def copy(self) -> None:
        """Take what is to be written out of the training's hands, into the host's memory."""
        self.files = [(name, [(item, _copied(item, data)) for item, data in share]) for name, share in self.files]

    def write(self) -> Written:
        """Write and hash this rank's files, beside each other, and bring them to the disk."""
        written = Written()
        try:
            with ThreadPoolExecutor(max(1, len(self.files))) as threads:
                parts = list(threads.map(self._write, *zip(*self.files, strict=True))) if self.files else []
        except Exception as error:  # whatever it is, other ranks wait to be told
            written.problem = str(error) or repr(error)
        else:
            written.results = [result for results, _ in parts for result in results]
            written.entries = {name: entry for (name, _), (_, entry) in zip(self.files, parts, strict=True)}
        finally:
            self.files = []  # a copy of the state
        return written

    def finish_all(self, written: list[Written]) -> dict[str, dict[str, Any]]:
        """On the first rank, when all have written: write what says where the tensors lie. Returns all files' entries
        in integrity.json; raises RuntimeError where a rank could not write."""
        problem = next((one.problem for one in written if one.problem), "")
        if problem:
            raise RuntimeError(problem)
        self.finish(self.metadata, [one.results for one in written])
        serialization.save_config(CheckpointingConfig(*FORMAT), str(self.checkpoint_dir))
        return {name: entry for one in written for name, entry in one.entries.items()}

    def _write(self, name: str, share: list[tuple[WriteItem, Any]]) -> tuple[list[WriteResult], dict[str, Any]]:
        with HashedFile(Path(self.checkpoint_dir) / name) as file:
            results = [
                filesystem_async._write_item(
                    self.transforms, file, on_host(data), item, name, SerializationFormat.TORCH_SAVE
                )
                for item, data in share
            ]
            file.flush()
            os.fsync(file.fileno())
            return results, {"bytes": file.tell(), "sha256": file.sha256.hexdigest()}


def on_host(data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    """What is written: a tensor's own numbers, not all of the storage that it is a part of."""
    if isinstance(data, io.BytesIO):
        return data
    data = data.detach().cpu()
    return data.clone() if data.untyped_storage().nbytes() != data.nbytes else data


def _copied(item: WriteItem, data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    return data if item.type == WriteItemType.BYTE_IO else data.detach().to("cpu", copy=True)  # type: ignore[union-attr]


class _Plan(strategies.TorchDistSaveShardedStrategy):
    """megatron-core's saving without its writing."""

    writer: ShardWriter

    def _get_save_and_finalize_callbacks(self, writer: ShardWriter, planned: Any) -> AsyncRequest:
        _, writer.metadata, _ = planned
        self.writer = writer
        return AsyncRequest(None, (), [])


class Planner:
    """Says what each rank writes: of what several ranks hold one writes it, such that all have about as much to do."""

    def __init__(self) -> None:
        self._plan = _Plan(*FORMAT)
        self._balanced = FullyParallelSaveStrategyWrapper(self._plan, do_cache_distribution=True)
        self._is_checked = False

    def plan(self, state: Any, folder: Path) -> ShardWriter:
        """What this rank has to write of a sharded state. The first rank writes the rest of it at once. A collective
        call; raises what megatron-core raises, and OSError on the first rank alone."""
        failures: list[Exception] = []
        save_common = _keeping(failures, TorchCommonSaveStrategy.save_common)
        with (
            _replaced(strategies, "FileSystemWriterAsync", ShardWriter),
            _replaced(TorchCommonSaveStrategy, "save_common", save_common),
        ):
            # That pieces make up their tensors is the same at every save of a run.
            dist_checkpointing.save(
                state,
                str(folder),
                self._balanced,
                validate_access_integrity=not self._is_checked,
                async_sharded_save=True,
            )
        self._is_checked = True  # on all ranks, also where one has failed
        if failures:
            raise failures[0]
        return self._plan.writer


@contextmanager
def _replaced(owner: Any, name: str, ours: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _keeping(failures: list[Exception], write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, whose failures are kept instead of raised: others wait in the collectives behind it."""

    def kept(*arguments: Any, **named: Any) -> Any:
        try:
            return write(*arguments, **named)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    return kept
