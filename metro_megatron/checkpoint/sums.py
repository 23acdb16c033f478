"""By what a file of a checkpoint is known to be what was written.

Every load compares CRC-32, which finds what disks, cables and memory do to files and is as fast as memory. SHA-256,
forty times as slow, also tells whether two files are the same: runs are named by it, and tools/checkpoint_info.py
--verify compares it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from isal.isal_zlib import crc32

from metro_megatron.files import read_through


class Sum(Protocol):
    """Of the bytes that it was given, as hashlib has it."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc32:
    """CRC-32 as one of hashlib's sums."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        """Of all bytes so far."""
        return f"{self._value:08x}"


KINDS: Mapping[str, Callable[[], Sum]] = {"crc32": Crc32, "sha256": hashlib.sha256}
"""By their names in integrity.json, the fastest first; earlier checkpoints have SHA-256 alone."""


class Sums:
    """Of some kinds, of the same bytes."""

    def __init__(self, kinds: Iterable[str] = KINDS):
        self._sums: dict[str, Sum] = {kind: KINDS[kind]() for kind in kinds}

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""
        for one in self._sums.values():
            one.update(data)

    def found(self) -> dict[str, str]:
        """In hexadecimal, by kind, of all bytes so far."""
        return {kind: one.hexdigest() for kind, one in self._sums.items()}


def fastest(entry: Mapping[str, Any]) -> list[str]:
    """The kind that a load compares, of those that integrity.json has of a file."""
    return [kind for kind in KINDS if kind in entry][:1]


def file_sums(path: Path, kinds: Iterable[str] = KINDS) -> tuple[int, dict[str, str]]:
    """Bytes of a file, and their sums. Raises OSError as files.opened."""
    sums = Sums(kinds)
    return read_through(path, sums.update), sums.found()
