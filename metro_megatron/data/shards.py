"""Shards: token ids in megatron-core's IndexedDataset format (`.bin`, `.idx`), manifest and tokenizer.

One sequence of the IndexedDataset is one unit; its document index marks documents. `.idx`, little-endian:
`MMIDIDX\\0\\0`, version u64, dtype code u8, U u64, D + 1 u64, lengths i32 [U], byte offsets i64 [U],
document index i64 [D + 1]. U units, D documents, T tokens. Written by `shard_writer`.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError

FORMAT_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPE_CODES: dict[str, int] = {"int32": 4, "uint16": 8}
"""megatron-core's numbers for the dtypes used here."""

_REMEDY = "write the shard again with tools/preprocess_data.py"
_MANIFEST_TYPES = {
    "tokenizer_sha256": str,
    "vocab_size": int,
    "documents": int,
    "units": int,
    "tokens": int,
    "files": dict,
}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where ids fit (megatron-core's rule: below 65,500), int32 otherwise."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class ShardPaths:
    """The files of a shard, from its prefix."""

    prefix: str

    @property
    def bin(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        return Path(f"{self.prefix}.idx")

    @property
    def manifest(self) -> Path:
        return Path(f"{self.prefix}.manifest.json")

    @property
    def tokenizer(self) -> Path:
        return Path(f"{self.prefix}.tokenizer")


@dataclass(frozen=True)
class Shard:
    """A finished shard, memory-mapped."""

    prefix: str
    manifest: dict[str, Any]
    unit_lengths: NDArray[np.int32]
    """[U] tokens of each unit."""
    document_index: NDArray[np.int64]
    """[D + 1] document d is units document_index[d] to document_index[d + 1]."""
    tokens: NDArray[np.integer]
    """[T] all ids, without specials; uint16 or int32."""

    @classmethod
    def open(cls, prefix: str) -> "Shard":
        """Check the shard's files against each other, in a time independent of their size, and map them.

        Raises UserError if the manifest is missing or unreadable, a size is not the manifest's, or the index
        is damaged or speaks of other tokens than `.bin` holds.
        """
        paths = ShardPaths(prefix)
        manifest = _read_manifest(paths)
        for path, name in ((paths.bin, "bin"), (paths.idx, "idx")):
            _check_size(path, manifest["files"][name]["bytes"])
        dtype, unit_lengths, document_index = _read_index(paths.idx, manifest)
        if paths.bin.stat().st_size != manifest["tokens"] * dtype.itemsize:
            raise UserError(
                f"{paths.bin}: {paths.bin.stat().st_size:,} bytes, but its index counts "
                f"{manifest['tokens']:,} {dtype} tokens; {_REMEDY}"
            )
        return cls(
            prefix, manifest, unit_lengths, document_index, np.memmap(paths.bin, dtype=dtype, mode="r")
        )

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer folder these ids come from."""
        return ShardPaths(self.prefix).tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, specials included."""
        return int(self.manifest["vocab_size"])

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer's `tokenizer.model`."""
        return str(self.manifest["tokenizer_sha256"])


def open_shards(prefixes: Sequence[str]) -> list[Shard]:
    """Open all; raises one UserError for all that is wrong with them, different tokenizers included."""
    shards: list[Shard] = []
    problems = [] if prefixes else ["no shards given; name prefixes written by tools/preprocess_data.py"]
    for prefix in prefixes:
        try:
            shards.append(Shard.open(prefix))
        except UserError as error:
            problems += error.problems
    for shard in shards[1:]:
        if (shard.tokenizer_sha256, shard.vocab_size) != (shards[0].tokenizer_sha256, shards[0].vocab_size):
            problems.append(
                f"{shard.prefix} has tokenizer {shard.tokenizer_sha256[:12]} with {shard.vocab_size:,} ids, "
                f"{shards[0].prefix} has {shards[0].tokenizer_sha256[:12]} with {shards[0].vocab_size:,}; "
                "preprocess both with one tokenizer"
            )
    if problems:
        raise UserError(problems)
    return shards


def _read_manifest(paths: ShardPaths) -> dict[str, Any]:
    path = paths.manifest
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        what = "it was not finished" if paths.bin.exists() else "there is no such shard"
        raise UserError(f"{path}: no such file, so {what}; {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise UserError(f"{path}: format_version {found}, this program reads {FORMAT_VERSION}; {_REMEDY}")
    wrong = [key for key, kind in _MANIFEST_TYPES.items() if not isinstance(manifest.get(key), kind)]
    wrong += [] if wrong else [name for name in ("bin", "idx") if not _has_size(manifest["files"].get(name))]
    if wrong:
        raise UserError(f"{path}: damaged (no usable {', '.join(wrong)}); {_REMEDY}")
    return manifest


def _has_size(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes, its manifest says {expected:,}: damaged; {_REMEDY}")


def _read_index(
    path: Path, manifest: dict[str, Any]
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Token dtype, unit lengths, document index; the ends of the arrays are checked, not their middles."""
    units, documents, tokens = manifest["units"], manifest["documents"], manifest["tokens"]
    dtype = token_dtype(manifest["vocab_size"])
    damaged = UserError(f"{path}: damaged (contradicts its manifest); {_REMEDY}")
    try:
        with open(path, "rb") as file:
            header = file.read(INDEX_HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    expected = (INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype.name], units, documents + 1)
    if len(header) != INDEX_HEADER.size or INDEX_HEADER.unpack(header) != expected:
        raise damaged
    if path.stat().st_size != INDEX_HEADER.size + 12 * units + 8 * (documents + 1) or units < 1:
        raise damaged
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=0)[INDEX_HEADER.size :]
    lengths = content[: 4 * units].view("<i4")
    offsets = content[4 * units : 12 * units].view("<i8")
    document_index = content[12 * units :].view("<i8")
    if offsets[0] != 0 or offsets[-1] + int(lengths[-1]) * dtype.itemsize != tokens * dtype.itemsize:
        raise damaged
    if document_index[0] != 0 or document_index[-1] != units:
        raise damaged
    return dtype, lengths, document_index
