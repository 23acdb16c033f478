"""The model tensors of a training checkpoint, read in one process without megatron-core and without a GPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from metro_megatron.checkpoint.files import (
    AVERAGE,
    METADATA,
    check_metadata,
    integrity_entries,
    iteration_folder,
    newest_step,
    verify_integrity,
)
from metro_megatron.checkpoint.pieces import Piece, files_of, read_pieces
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError

OPTIMIZER_PREFIX = "optimizer."
TOKENIZER = "tokenizer"
"""Folder of a run's tokenizer."""
SEGMENTS = "segments.safetensors"
"""File of a run that began with an ELECTRA."""


def find_iteration(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest complete one of a run folder.

    Raises UserError if there is none.
    """
    if (path / METADATA).is_file():
        return path
    step = newest_step(path)
    if step is None:
        raise UserError(
            f"{path}: neither a checkpoint (no {METADATA}) nor a run folder with one (no iter_ folder); "
            "give the folder of train.output or one of its iter_ folders"
        )
    return iteration_folder(path, step)


def find_segments(iteration: Path) -> Path | None:
    """The file of an ELECTRA's segments that a run began with, where its tokenizer is; None for other runs."""
    places = (iteration / SEGMENTS, iteration.resolve().parent / SEGMENTS)
    return next((path for path in places if path.is_file()), None)


def find_tokenizer(iteration: Path) -> Path:
    """The run's tokenizer folder: beside its checkpoints, or in one that stands alone.

    Raises UserError if there is none.
    """
    beside = iteration.resolve().parent / TOKENIZER
    for folder in (iteration / TOKENIZER, beside):
        if folder.is_dir():
            return folder
    raise UserError(f"{beside}: no such folder; a checkpoint's tokenizer is expected beside it in the run folder")


def read_average(folder: Path) -> dict[str, Any]:
    """average.json of a checkpoint folder; empty where it is no average."""
    path = folder / AVERAGE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def stored_config(folder: Path) -> Config:
    """The configuration of a checkpoint folder's model: an average of main alone has no auxiliary."""
    config = load_config(folder / "run_config.yaml")
    if read_average(folder).get("part") == "main" and config.corruption.trains_auxiliary:
        # Main is the same whoever fills its masks; of what fills them without a model, uniform asks for nothing.
        return replace(config, corruption=replace(config.corruption, source="uniform"))
    return config


@dataclass(frozen=True)
class StoredModel:
    """The model in a checkpoint: whole tensors by their global names, read when asked for."""

    folder: Path
    metadata: Metadata
    unverified: set[str] = field(default_factory=set)
    """Names of files that are compared before anything is read of them."""

    @classmethod
    def open(cls, folder: Path) -> StoredModel:
        """A file of tensors is compared with integrity.json when the first of them is read, the others now.

        Raises UserError when a file is damaged, the metadata is not plain, or there is no model.
        """
        verify_integrity(folder, [name for name in integrity_entries(folder) if not name.endswith(".distcp")])
        metadata = check_metadata(folder)
        model = cls(folder, metadata, {place.relative_path for place in (metadata.storage_data or {}).values()})
        if not model.stored:
            raise UserError(f"{folder}: holds no model tensors")
        return model

    def verify_weights(self) -> None:
        """Compare the files of all that is the model's with integrity.json, each once. Raises UserError as `open`."""
        files = files_of(self.metadata, self.stored) & self.unverified
        verify_integrity(self.folder, files)
        self.unverified.difference_update(files)

    @cached_property
    def stored(self) -> dict[str, TensorStorageMetadata]:
        """Size and format of every tensor of the model."""
        return {name: entry for name, entry in self.all_stored.items() if not name.startswith(OPTIMIZER_PREFIX)}

    @cached_property
    def all_stored(self) -> dict[str, TensorStorageMetadata]:
        """`stored`, and those of the optimizer."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def num_bytes(self, names: Iterable[str]) -> int:
        """Of some tensors."""
        found = [self.stored[name] for name in names]
        return sum(one.size.numel() * one.properties.dtype.itemsize for one in found)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in the format that they were saved in. Raises UserError when a file is damaged."""
        stored = {name: self.all_stored[name] for name in names}
        tensors = {
            name: torch.empty(one.size, dtype=one.properties.dtype, device="cpu") for name, one in stored.items()
        }
        pieces = [Piece(name, tuple(one.shape), (0,) * one.dim(), one) for name, one in tensors.items()]
        summed = files_of(self.metadata, stored) & self.unverified
        read_pieces(self.folder, self.metadata, pieces, summed)
        self.unverified.difference_update(summed)
        return tensors

    @property
    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """What reads each tensor."""
        return {name: partial(self._read_one, name) for name in self.stored}

    def _read_one(self, name: str) -> Tensor:
        return self.read([name])[name]

    def extra_states(self) -> Iterator[tuple[str, bytes]]:
        """What layers save beside tensors, by name and as it lies in the file: megatron-core asks for it when loading,
        though layers of ours leave it empty."""
        for index, place in (self.metadata.storage_data or {}).items():
            stored = self.metadata.state_dict_metadata[index.fqn]
            if isinstance(stored, BytesStorageMetadata) and not index.fqn.startswith(OPTIMIZER_PREFIX):
                with (self.folder / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    yield index.fqn, file.read(place.length)


@contextmanager
def without_distributed_warning() -> Iterator[None]:
    """torch says that its process group is not there, as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
