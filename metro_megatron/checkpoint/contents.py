"""What a checkpoint or an exported folder holds, and in what two of them differ: by names, without loading a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_megatron.checkpoint.files import INTEGRITY, METADATA, check_metadata, verify_integrity, verify_sizes
from metro_megatron.checkpoint.read import StoredModel, find_iteration
from metro_megatron.checkpoint.sums import KINDS
from metro_megatron.cli.options import flatten
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.hf.stored import FILES, stored_tensors


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """Of one folder."""

    folder: Path
    tensors: Mapping[str, Stored]
    options: Mapping[str, Any]
    """Its configuration, flat: ours of a checkpoint, transformers' of an exported folder; empty where it is missing."""
    defaults: Mapping[str, Any]
    """Of these options, where they have any."""
    progress: Mapping[str, Any]
    """progress.json; empty where there is none."""

    @classmethod
    def open(cls, path: Path) -> Contents:
        """Of a checkpoint, of the newest of a run folder, or of an exported folder. Raises UserError if it is none of
        them, or cannot be read; no byte of a tensor is."""
        exported = any((path / name).is_file() or (path / f"{name}.index.json").is_file() for name in FILES)
        if exported and not (path / METADATA).is_file():
            return cls._of_export(path)
        folder = find_iteration(path)
        model = StoredModel(folder, check_metadata(folder))
        tensors = {
            name: Stored(tuple(entry.size), entry.properties.dtype, partial(_read, model, name))
            for name, entry in model.all_stored.items()
        }
        config = folder / "run_config.yaml"
        return cls(
            folder,
            tensors,
            flatten(load_config(config)) if config.is_file() else {},
            flatten(Config()),
            _read_object(folder / "progress.json"),
        )

    @classmethod
    def _of_export(cls, folder: Path) -> Contents:
        stored = stored_tensors(folder)
        tensors = {}
        for name in stored:
            tensor = stored[name]  # mapped, not read
            tensors[name] = Stored(tuple(tensor.shape), tensor.dtype, partial(stored.__getitem__, name))
        return cls(folder, tensors, _read_object(folder / "config.json"), {}, {})

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(one.num_bytes for one in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    @property
    def has_integrity(self) -> bool:
        """Whether something says what its files should be: an exported folder has nothing that does."""
        return (self.folder / METADATA).is_file() or (self.folder / INTEGRITY).is_file()

    def damage(self, contents: bool, on_bytes: Callable[[int], object] = lambda size: None) -> list[str]:
        """What is wrong with its files: with their lengths, or with all they hold."""
        try:
            if contents:
                verify_integrity(self.folder, on_bytes=on_bytes, kinds=KINDS)
            else:
                verify_sizes(self.folder)
        except UserError as error:
            return error.problems
        return []


def _read_object(path: Path) -> dict[str, Any]:
    """Of JSON; empty where there is no such file. Raises UserError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, holds no JSON object ({error}); give another copy") from error


def _read(model: StoredModel, name: str) -> Tensor:
    return model.read([name])[name]


@dataclass(frozen=True)
class Difference:
    """Two tensors of one name and shape that are not equal bit for bit."""

    name: str
    largest: float
    """Of the absolute differences; NaN where one is not a number."""
    share: float
    """Of the numbers that differ."""
    dtypes: tuple[torch.dtype, torch.dtype]


def option_differences(one: Contents, other: Contents) -> Iterator[tuple[str, Any, Any]]:
    """(name, here, there) of each option that differs; None: is not there."""
    for name in {**one.options, **other.options}:
        here, there = one.options.get(name), other.options.get(name)
        if here != there:
            yield name, here, there


def misfits(one: Contents, other: Contents) -> Iterator[str]:
    """A line for each tensor that only one has, or that has another shape."""
    for name in {**one.tensors, **other.tensors}:
        here, there = one.tensors.get(name), other.tensors.get(name)
        if here is None or there is None:
            yield f"{name}: only in {other.folder if here is None else one.folder}"
        elif here.shape != there.shape:
            yield f"{name}: {list(here.shape)} in {one.folder}, {list(there.shape)} in {other.folder}"


def differences(
    one: Contents, other: Contents, on_bytes: Callable[[int], object] = lambda size: None
) -> Iterator[Difference]:
    """Of the tensors that fit, read two at a time; on_bytes hears of what has been read."""
    for name in comparable(one, other):
        here, there = one.tensors[name].read(), other.tensors[name].read()
        on_bytes(here.nbytes + there.nbytes)
        if here.dtype == there.dtype and torch.equal(_bits(here), _bits(there)):
            continue
        a, b = here.double(), there.double()
        # Of bits that differ in equal numbers, two zeros or two that are none, the difference is none.
        share = float((a != b).double().mean()) if a.numel() else 0.0
        largest = float((a - b).abs().max()) if a.numel() else 0.0
        yield Difference(name, largest, share, (here.dtype, there.dtype))


def comparable(one: Contents, other: Contents) -> list[str]:
    """Names of the tensors that both have, in one shape."""
    both = [name for name in one.tensors if name in other.tensors]
    return [name for name in both if one.tensors[name].shape == other.tensors[name].shape]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
