"""Whether files have the sizes and the SHA-256 that a record says."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metro_megatron.data.manifest import FileEntry
from metro_megatron.files import is_partial, sized_sha256

_THREADS = 8
"""Hashing and reading both leave Python to other threads."""
_WORTH_THREADS = 4 << 20
"""Bytes, hashed in milliseconds: to start threads for each of many small datasets took a third of opening them."""


def file_entry(path: Path) -> FileEntry:
    """Of a file as it is. Raises OSError if it cannot be read."""
    return FileEntry(*sized_sha256(path))


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Of the finished files of a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not is_partial(path))
    return {path.name: file_entry(path) for path in paths}


def damaged_files(files: Mapping[Path, FileEntry], remedy: str) -> Iterator[str]:
    """A line for each file that cannot be read or is not what its entry says; reads all of them."""
    each: Iterable[str | None] = map(_problem, files, files.values())
    if sum(entry.bytes for entry in files.values()) > _WORTH_THREADS:
        with ThreadPoolExecutor(_THREADS) as threads:
            each = list(threads.map(_problem, files, files.values()))
    for problem in each:
        if problem:
            yield f"{problem}; {remedy}"


def _problem(path: Path, expected: FileEntry) -> str | None:
    try:
        found = file_entry(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if found.bytes != expected.bytes:
        return f"{path}: {found.bytes:,} bytes, {expected.bytes:,} when written: damaged"
    if found != expected:
        return f"{path}: SHA-256 {found.sha256}, {expected.sha256} when written: damaged"
    return None
