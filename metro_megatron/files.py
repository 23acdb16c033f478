"""Files and folders that are there whole or not at all, and locks: the one home of temporary names and renames.

Everything is written under a temporary name first and renamed when it is finished, which a file system does in one
step. Content is brought to the disk before the rename: a power failure may otherwise keep the new name and lose what
stands behind it. `sync_folder` brings the names themselves there.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from metro_megatron.errors import UserError

_PARTIAL = ".partial"
_PIECE_BYTES = 1 << 18


def _partial_name(path: Path) -> Path:
    """A temporary name beside `path`, unique, so that two processes that write one file do not meet."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")


def opened(path: Path) -> BufferedReader:
    """A file to be read, as opened_size has it."""
    return os.fdopen(opened_size(path)[0], "rb")


def opened_size(path: Path) -> tuple[int, int]:
    """Descriptor of a file to be read, which the caller closes, and bytes: opened at once, as a pipe would wait for
    whoever writes into it.

    Raises OSError where there is none, or a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status.st_size
    os.close(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.ENXIO, "a pipe, a socket or a device", str(path))


def content_of(path: Path) -> bytes:
    """All that a file holds. Raises OSError as opened."""
    with opened(path) as file:
        return file.read()


def read_through(path: Path, take: Callable[[bytes], object]) -> int:
    """Hand over all that a file holds, piece by piece. Returns bytes; raises OSError as opened."""
    # Half of hashlib.file_digest's time where there are thousands of small files.
    descriptor, size = opened_size(path)
    try:
        while piece := os.read(descriptor, min(size + 1, _PIECE_BYTES)):
            take(piece)
    finally:
        os.close(descriptor)
    return size


def sized_sha256(path: Path) -> tuple[int, str]:
    """Bytes of a file, and their SHA-256 in hexadecimal. Raises OSError as opened."""
    digest = hashlib.sha256()
    return read_through(path, digest.update), digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Of all that a file holds, in hexadecimal. Raises OSError as opened."""
    return sized_sha256(path)[1]


def is_partial(path: Path) -> bool:
    """Whether a file or folder is unfinished, by its name."""
    return path.name.endswith(_PARTIAL)


def remove_partial(folder: Path) -> None:
    """Remove the unfinished files of processes that died; for who has the folder alone."""
    for path in filter(is_partial, folder.iterdir()):
        path.unlink()


@contextmanager
def whole_files(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open new files that get their names, all of them, when the block ends, and vanish if it raises."""
    partials = [_partial_name(path) for path in paths]
    files: list[BinaryIO] = []
    try:
        for partial, path in zip(partials, paths, strict=True):
            try:
                files.append(partial.open("w+b"))
            except OSError as error:
                error.filename = str(path)  # which is what the user knows
                raise
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    finally:
        for file, partial in zip(files, partials, strict=False):
            # A file that has its name is whole, whatever the storage says of the other name, which is gone.
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                partial.unlink()


def json_lines(path: Path, *names: str) -> list[dict[str, Any]]:
    """The objects of a file of one a line that have all these names; none if there is no file.

    A line that a crash has cut short, or that was damaged, is left out.
    """
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and value.keys() >= set(names):
                found.append(value)
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a crash or a power failure sees the old content or the new one."""
    with whole_files([path]) as (file,):
        file.write(content)
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """`write_whole` of a small text, in UTF-8."""
    write_whole(path, text.encode())


def move_whole(finished: Path, path: Path) -> None:
    """Give a finished file or folder its name, on the same file system; what had that name before goes."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(finished, path)


@contextmanager
def first_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to be filled; it becomes `path` when the block ends, unless another was first."""
    partial = _partial_name(path)
    partial.mkdir()
    try:
        yield partial
        if not path.exists():
            os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(output: Path, own_files: Collection[str], mark: str = "") -> Iterator[Path]:
    """Yield an empty folder to be filled; it becomes `output` when the block ends, and is removed if it raises.

    An earlier output, made of own_files with `mark` among them, is replaced; anything else there raises UserError.
    """
    refuse_foreign(output, own_files, mark)
    output = output.absolute()
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # Again, as filling may take hours in which a user may have put something there.
        refuse_foreign(output, own_files, mark)
        if output.exists():
            # The earlier output is out of the way before it is removed: a folder cannot be replaced in one step.
            replaced = output.with_name(f".{output.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
            unfinished.rename(output)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_foreign(output: Path, own_files: Collection[str], mark: str = "") -> None:
    """Raise UserError if `output` exists and is anything but a folder of files that match a pattern of own_files.

    mark: the one of them that every output has, and no folder of others that looks like one; empty: there is none.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; choose a folder")
    names = sorted(path.name for path in output.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own_files)]
    if foreign:
        raise UserError(f"{output} holds {foreign[0]!r}, which this tool has not written; choose another folder")
    if names and mark and mark not in names:
        raise UserError(f"{output} has no {mark}, so this tool has not written it; choose another folder")


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BinaryIO]:
    """Hold the lock file `path` alone; the kernel lets go of it however the process ends.

    Yields the open file: a process that inherits it holds the lock, too, as long as it lives. Without `wait`, raises
    BlockingIOError while another process holds it. On a file system without locks nobody is kept out.
    """
    with _lock_file(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield lock


def _lock_file(path: Path) -> BinaryIO:
    """The lock file, made if missing; another user's, which may only be read, locks as well."""
    try:
        return path.open("ab")
    except PermissionError:
        if not path.exists():
            raise
        return path.open("rb")
