"""Whether a checkpoint folder is whole, and whether reading it is safe.

integrity.json holds size, CRC-32 and SHA-256 of every file. `.metadata`, which torch reads with plain pickle, may only
refer to the classes that describe tensors.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metro_megatron.checkpoint.sums import KINDS, fastest, file_sums
from metro_megatron.errors import UserError
from metro_megatron.files import file_sha256

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

AVERAGE = "average.json"
"""What an average of checkpoints was made of; no other checkpoint has it."""
INTEGRITY = "integrity.json"
METADATA = ".metadata"
TRACKER = "latest_checkpointed_iteration.txt"
TRIAL = ".save_trial"
"""Begins the names of what a run writes, and removes, to see whether it can be saved."""
_READING_THREADS = 8

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ALLOWED_GLOBALS = frozenset(
    [
        *(("torch", name) for name in ("Size", *_DTYPES)),
        ("pathlib", "PosixPath"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ]
)
"""(module, name) of everything that a `.metadata` written by torch 2 and megatron-core refers to."""


def iteration_folder(run: Path, step: int) -> Path:
    """Folder of a run's checkpoint after `step` steps."""
    return run / f"iter_{step:07d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of all complete checkpoints of a run folder, ascending."""
    named = [folder for folder in run.glob("iter_*") if re.fullmatch("[0-9]+", folder.name[5:]) and folder.is_dir()]
    return sorted(step for folder in named if iteration_folder(run, step := int(folder.name[5:])) == folder)


def tracked_step(run: Path) -> int | None:
    """What the tracker of a run folder says, if it names a checkpoint that is there; else None."""
    try:
        text = (run / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return next((step for step in saved_steps(run) if text == str(step)), None)


def newest_step(run: Path) -> int | None:
    """Steps of the newest complete checkpoint of a run folder; None if it has none."""
    return next(iter(resumable_steps(run)), None)


def resumable_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run may go on from, the best first: the tracker's and older ones, or all where
    the tracker is lost."""
    steps, tracked = saved_steps(run)[::-1], tracked_step(run)
    return steps if tracked is None else [step for step in steps if step <= tracked]


def file_entries(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What integrity.json says of files, by name."""
    paths = sorted(paths)
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        found = list(threads.map(file_sums, paths))
    return {path.name: {"bytes": size, **sums} for path, (size, sums) in zip(paths, found, strict=True)}


def write_integrity(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Write integrity.json about all files of `folder`; the last thing to do to a checkpoint.

    known: entries that others have made of the files they wrote. Raises UserError where such a file is not there, nor
    one that `.metadata` refers to.
    """
    known = known or {}
    there = {path.name: path for path in folder.iterdir() if path.is_file() and path.name != INTEGRITY}
    wanted = known.keys() | _referred_to(check_metadata(folder))
    absent = sorted(wanted - there.keys())
    if absent:
        raise UserError(
            f"{folder}: {len(absent)} of {len(wanted)} files that ranks have written are not there ({absent[0]}): "
            "train.output must be one folder for all machines, on storage that they share"
        )
    files = {**known, **file_entries(path for name, path in there.items() if name not in known)}
    (folder / INTEGRITY).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def verify_sizes(folder: Path) -> None:
    """Compare the lengths of all files with integrity.json. Raises UserError naming all that are missing or damaged."""
    found = (_size_problem(folder / name, entry) for name, entry in sorted(integrity_entries(folder).items()))
    problems = [problem for problem in found if problem]
    if problems:
        raise UserError([*problems, _another(folder)])


def verify_texts(folder: Path) -> None:
    """Compare what is read of a checkpoint before all of it is compared: its configuration, and its place in the run.

    Raises UserError as verify_integrity, but for integrity.json that is missing.
    """
    entries = integrity_entries(folder) if (folder / INTEGRITY).is_file() else {}
    problems = [
        f"{folder / name}: missing or damaged"
        for name in sorted(entries.keys() & {"run_config.yaml", "progress.json"})
        if not (folder / name).is_file() or _problem(folder / name, entries[name], file_sums(folder / name)[1])
    ]
    if problems:
        raise UserError([*problems, _another(folder)])


def files_of_rank(folder: Path, rank: int, world_size: int) -> list[str]:
    """Names of the files that a rank looks at, where each looks at some: of as many ranks as wrote it, each its own,
    which it reads anyway. Raises UserError where integrity.json is missing or damaged."""
    files = integrity_entries(folder)
    writers = {name: int(name.split("_")[2]) for name in files if re.fullmatch(r"__\d+_\d+\.distcp", name)}
    if set(writers.values()) == set(range(world_size)):
        return [name for name in files if writers.get(name, 0) == rank]
    return sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::world_size]


class Damaged(UserError):
    """Files of a checkpoint are not what was written."""


def verify_integrity(
    folder: Path,
    names: Collection[str] | None = None,
    on_bytes: Callable[[int], object] = lambda size: None,
    *,
    kinds: Collection[str] = (),
) -> None:
    """Compare files with integrity.json: all, or those of these names.

    on_bytes hears of what has been read. kinds: sums that are compared, of those that are there; the fastest one if
    none are named. Raises Damaged naming all that are missing or damaged.
    """
    entries = integrity_entries(folder)
    wanted = sorted(entries if names is None else names)
    whole = [name for name in wanted if name in entries and not _size_problem(folder / name, entries[name])]
    found: dict[str, dict[str, str]] = {name: {} for name in wanted}

    def read(name: str) -> dict[str, str]:
        return file_sums(folder / name, kinds or fastest(entries[name]))[1]

    with ThreadPoolExecutor(_READING_THREADS) as threads:
        for name, sums in zip(whole, threads.map(read, whole), strict=True):
            on_bytes(entries[name]["bytes"])
            found[name] = sums
    compare_sums(folder, found)


def compare_sums(folder: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Compare sums of files, by name and kind, with integrity.json. Raises Damaged naming all that are missing or
    damaged."""
    entries = integrity_entries(folder)
    unknown = sorted(found.keys() - entries.keys())
    if unknown:
        raise Damaged(f"{folder / INTEGRITY}: says nothing of {unknown[0]}; {_another(folder)}")
    problems = [_problem(folder / name, entries[name], sums) for name, sums in sorted(found.items())]
    if any(problems):
        raise Damaged([*filter(None, problems), _another(folder)])


def _problem(path: Path, expected: Mapping[str, Any], sums: Mapping[str, str]) -> str:
    """What is wrong with a file of these sums, of which one at least is expected if its size is."""
    if size_problem := _size_problem(path, expected):
        return size_problem
    compared = sums.keys() & expected.keys()
    if not compared:
        return f"{path}: changes while it is read"
    wrong = [f"{kind} {sums[kind][:12]}" for kind in KINDS if kind in compared and sums[kind] != expected[kind]]
    return f"{path}: damaged, its contents are not what was written ({', '.join(wrong)})" if wrong else ""


def _size_problem(path: Path, expected: Mapping[str, Any]) -> str:
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path}: damaged, has {size} bytes and was written with {expected['bytes']}"
    return ""


def _another(folder: Path) -> str:
    return f"{folder}: use another copy of this checkpoint, or an older one"


def checkpoint_sha256(folder: Path) -> str:
    """Of integrity.json, and so of all files of a checkpoint."""
    return file_sha256(folder / INTEGRITY)


def check_metadata(folder: Path) -> Metadata:
    """Read `.metadata` without running anything it contains, and return it.

    Raises UserError if it is unreadable, refers to anything but ALLOWED_GLOBALS, or to files outside the folder.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = SafeUnpickler(file, path).load()
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no .metadata in it, so not a checkpoint; give a folder such as iter_0000500"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything, MemoryError included
        raise UserError(f"{path}: unreadable ({error}); use another copy of this checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
    outside = sorted(name for name in _referred_to(metadata) if os.path.basename(name) != name)
    if outside:
        raise UserError(f"{path}: refers to {outside[0]!r} outside its folder; do not use this checkpoint")
    return metadata


def _referred_to(metadata: Metadata) -> set[str]:
    """Names of the files that hold the tensors."""
    return {info.relative_path for info in (metadata.storage_data or {}).values()}


class SafeUnpickler(pickle.Unpickler):
    """Loads only what ALLOWED_GLOBALS names; anything else raises UserError before it is imported."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise UserError(
                f"{self._path}: refers to {module}.{name}, which no checkpoint does and which could run code; "
                "do not use this checkpoint"
            )
        return super().find_class(module, name)


def integrity_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What integrity.json says of each file. Raises UserError where it is missing or damaged."""
    path = folder / INTEGRITY
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if all({"bytes", "sha256"} <= entry.keys() and os.path.basename(name) == name for name, entry in files.items()):
            return files
        problem = "has an entry without bytes and sha256, or outside the folder"
    except FileNotFoundError:
        problem = "missing: the checkpoint is not complete, or not one of ours"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"unreadable ({error})"
    raise UserError(f"{path}: {problem}; use another copy of this checkpoint, or an older one")
