"""What the folder of a sample index holds, and whether it is whole: arrays, and a sealed record of their hashes.

A damaged index is no loss, as it is built again from the shards; it must only not be read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metro_megatron.data.file_hashes import damaged_files
from metro_megatron.data.manifest import FileEntry
from metro_megatron.data.records import SEAL, DamagedRecord, from_plain, sealed, unsealed
from metro_megatron.files import content_of

FACTS = "index.json"
"""Written last, so that an index is there when this file is."""
ARRAYS: Mapping[str, np.dtype[Any]] = {"shard": np.dtype("<i2"), "start": np.dtype("<i8"), "length": np.dtype("<i4")}
"""Each in a file NAME.bin; all have an entry for each sample."""

_REMEDY = "remove the folder, it is built again"


@dataclass(frozen=True)
class IndexFacts:
    """What is known of an index."""

    source_bounds: tuple[int, ...]
    """As SampleIndex has them."""
    content_tokens: int
    files: dict[str, FileEntry] | None = None
    """Of the arrays, by the names of ARRAYS; None in indices of earlier versions, which none reads any more."""

    @classmethod
    def read(cls, folder: Path) -> "IndexFacts":
        """Of the index in a folder. Raises DamagedRecord, or OSError."""
        content = content_of(folder / FACTS)
        facts = from_plain(cls, unsealed(content))
        if facts.files is not None and SEAL.encode() not in content:
            raise DamagedRecord("it has no seal")
        return facts

    def write(self, folder: Path) -> None:
        """Finish an index, in a folder that has another name yet."""
        (folder / FACTS).write_bytes(sealed(self))


def array_path(folder: Path, name: str) -> Path:
    """File of one of ARRAYS."""
    return folder / f"{name}.bin"


def index_damage(folder: Path, *, by_hash: bool) -> list[str]:
    """What is wrong with the index in a folder, by the sizes of its arrays or by their hashes."""
    try:
        facts = IndexFacts.read(folder)
    except (DamagedRecord, OSError) as error:
        return [f"{folder / FACTS}: damaged ({error}); {_REMEDY}"]
    files = {array_path(folder, name): entry for name, entry in (facts.files or {}).items()}
    if by_hash:
        return list(damaged_files(files, _REMEDY))
    return [f"{path}: damaged (size); {_REMEDY}" for path, one in files.items() if _size(path) != one.bytes]


def index_folder_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the indices that lie in a folder, if there is one."""
    for facts in sorted(folder.glob(f"*/{FACTS}")):
        yield from index_damage(facts.parent, by_hash=True)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
