"""The model tensors of a training checkpoint, read in one process without megatron-core and without a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from metro_megatron.checkpoint.files import (
    METADATA,
    TRACKER,
    check_metadata,
    iteration_folder,
    tracked_step,
    verify_integrity,
)
from metro_megatron.errors import UserError

OPTIMIZER_PREFIX = "optimizer."


def find_iteration(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest complete one of a run folder.

    Raises UserError if there is none.
    """
    if (path / METADATA).is_file():
        return path
    step = tracked_step(path)
    if step is None:
        raise UserError(
            f"{path}: neither a checkpoint (no {METADATA}) nor a run folder with one (no {TRACKER}); "
            "give the folder of train.output or one of its iter_ folders"
        )
    return iteration_folder(path, step)


def find_tokenizer(iteration: Path) -> Path:
    """The run's tokenizer folder, beside its checkpoints. Raises UserError if it is not there."""
    folder = iteration.resolve().parent / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint's tokenizer is expected beside it in the run folder")
    return folder


def read_model_tensors(iteration_folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model, whole and in the format it was saved in, by its global name.

    Raises UserError when a file is damaged (integrity.json) or the metadata is not plain.
    """
    verify_integrity(iteration_folder)
    metadata = check_metadata(iteration_folder)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not name.startswith(OPTIMIZER_PREFIX)
    }
    if not tensors:
        raise UserError(f"{iteration_folder}: holds no model tensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        dcp.load(tensors, storage_reader=_CheckedReader(iteration_folder, metadata), no_dist=True)
    return tensors


class _CheckedReader(dcp.FileSystemReader):
    """Uses metadata that has been checked instead of unpickling it again."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked
