"""The work folder of a preprocessing run: plan, finished steps, and files that are there whole or not at all.

A step (a chunk, a shard) is finished when its journal entry, a JSON file, lies under its final name. An entry is
renamed into place after the files it speaks of, so kill -9 at any moment loses unfinished steps only.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from metro_megatron.errors import UserError

PARTIAL = ".partial"
"""Ending of unfinished files."""

_PLAN, _LOCK = "plan.json", "lock"


class Journal:
    """What is known of a run that works in `folder`; one process at a time `opened` it, workers only add entries."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder alone, made if missing, without the unfinished files of a run that died.

        Raises UserError if another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.folder}: another process works in it; wait for it, or choose another prefix"
                ) from error
            except OSError:
                pass  # a file system without locks
            for path in self.folder.glob(f"*{PARTIAL}"):
                path.unlink()
            yield

    def plan(self) -> dict[str, Any] | None:
        """What the run is to do; None if no run has begun here. Raises UserError if it cannot be read."""
        return self.entry(_PLAN)

    def begin_or_continue(self, plan: Mapping[str, Any]) -> None:
        """Continue a run with this very plan; begin it, on an emptied folder, if another plan or none is here."""
        if self.plan() == plan:
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        self.write_entry(_PLAN, plan)

    def entry(self, name: str) -> dict[str, Any] | None:
        """Entry `name`, None if that step is not finished. Raises UserError for a damaged one."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove the folder {self.folder} and run again") from error

    def write_entry(self, name: str, content: Mapping[str, Any]) -> None:
        """Finish a step: the files it speaks of must be in place."""
        sync_folder(self.folder)
        write_whole(self.folder / name, to_json(content))


def to_json(content: Mapping[str, Any]) -> bytes:
    """JSON as this package writes it."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


@contextmanager
def whole_files(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    """Open new files that get their names, all of them, when the block ends, and vanish if it raises.

    Temporary names are unique, so that two workers at one step (a task that was given out again) do not meet.
    """
    unique = uuid.uuid4().hex[:12]
    partials = [path.with_name(f"{path.name}.{unique}{PARTIAL}") for path in paths]
    files: list[BinaryIO] = []
    try:
        files.extend(partial.open("w+b") for partial in partials)
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    finally:
        for file, partial in zip(files, partials, strict=False):
            with suppress(OSError):
                file.close()
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power failure."""
    with whole_files([path]) as (file,):
        file.write(content)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
