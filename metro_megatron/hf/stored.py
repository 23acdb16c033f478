"""Tensors in files of transformers and torch, by their names there: read when asked for, written shard by shard.

No code in a file runs.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metro_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES = ("model.safetensors", "pytorch_model.bin")
"""What transformers writes, or their `.index.json` where there are several; the first that is there is read."""
SHARD_SIZE = "5GB"
"""Of a file, as the hub recommends."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def stored_tensors(folder: Path) -> LazyTensors:
    """Those of a folder of transformers; files are mapped, not read.

    Raises UserError where there are none, or files are missing or damaged.
    """
    makers: dict[str, Callable[[], Tensor]] = {}
    for path in _weight_files(folder):
        names, read = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
        makers |= {name: partial(read, name) for name in names}
    return LazyTensors(makers)


def write_weights(folder: Path, tensors: LazyTensors, model: PreTrainedModel) -> None:
    """As `model.save_pretrained`, of a model on meta whose tensors are made now: memory holds those of one shard."""
    sizes = {name: one for name, one in model.state_dict().items() if name not in model.all_tied_weights_keys}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)
    for name, its_tensors in split.filename_to_tensors.items():
        save_file({one: tensors[one].contiguous() for one in its_tensors}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{FILES[0]}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, if that is tensors, plain values and argparse's Namespace; anything else is refused
    before it is imported.

    Tensors are mapped, not read, unless the file is older than torch 1.6. Raises UserError.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises anything
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refers to {refused[1]}, which could run code, and is not loaded; save its tensors alone, or "
                "have its configuration made plain values first"
            ) from error
        raise UserError(f"{path}: not readable as a file of torch ({in_short(error)}); give another copy") from error


def read_json(path: Path) -> dict[str, Any]:
    """A configuration of transformers. Raises UserError where it is none."""
    try:
        return dict(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); give the folder of a model") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); give another copy of the folder") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            listed = read_json(folder / f"{name}.index.json").get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(one, str) for one in listed.values()):
                raise UserError(
                    f"{folder / name}.index.json: no weight_map of files in it; give another copy of the folder"
                )
            paths = [folder / Path(one).name for one in dict.fromkeys(listed.values())]
            missing = [f"{path}: missing; give another copy of the folder" for path in paths if not path.is_file()]
            if missing:
                raise UserError(missing)
            return paths
    raise UserError(f"{folder}: no weights in it ({' or '.join(FILES)}); give the folder of a model of transformers")


def _open_safetensors(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({in_short(error)}); give another copy") from error
    return list(file.keys()), file.get_tensor


def _open_torch(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()):
        raise UserError(f"{path}: no state dict of tensors; give the folder of a model of transformers")
    return list(content), content.__getitem__


def in_short(error: Exception) -> str:
    """A library's message in a line."""
    return " ".join(str(error).split())[:200]
