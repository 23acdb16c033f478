"""Checksums of blocks, and hashes of the tokenizer's files, for a dataset of a version that wrote none."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from metro_megatron.data.blocks import BlockSums
from metro_megatron.data.file_hashes import file_entries, file_entry
from metro_megatron.data.manifest import FORMAT_VERSION, REMEDY, DatasetPaths, Manifest, read_manifest
from metro_megatron.data.records import sealed
from metro_megatron.errors import UserError
from metro_megatron.files import opened, write_whole
from metro_megatron.tokenizer.tokenizer import Tokenizer

_BLOCK_BYTES = 4 << 20


def add_checksums(prefix: str, on_read: Callable[[int], object] = lambda size: None) -> Manifest:
    """Write what is missing and return the manifest that speaks of it; the ids, and all that hangs on them, stay.

    `on_read` hears of the bytes of every block of ids. Raises UserError if ids or tokenizer are not those of the
    manifest: what is damaged must not be sealed.
    """
    manifest, paths = read_manifest(prefix), DatasetPaths(prefix)
    if Tokenizer.from_folder(paths.tokenizer).sha256 != manifest.tokenizer_sha256:
        raise UserError(f"{paths.tokenizer}: not the tokenizer of these shards; copy that one there")
    shards = []
    for number, shard in enumerate(manifest.shards):
        files = paths.shard(number)
        sums, sha256 = _sums(files.bin, on_read)
        if sha256 != shard.bin.sha256:
            raise UserError(f"{files.bin}: SHA-256 {sha256}, the manifest says {shard.bin.sha256}; {REMEDY}")
        write_whole(files.crc, sums.array().tobytes())
        shards.append(replace(shard, crc=file_entry(files.crc)))
    known = manifest.tokenizer_files or file_entries(paths.tokenizer)
    added = replace(manifest, format_version=FORMAT_VERSION, shards=tuple(shards), tokenizer_files=known)
    write_whole(paths.manifest, sealed(added))
    return added


def _sums(path: Path, on_read: Callable[[int], object]) -> tuple[BlockSums, str]:
    """Checksums and SHA-256 of a file."""
    sums, digest = BlockSums(), hashlib.sha256()
    with opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            sums.update(memoryview(block))
            digest.update(block)
            on_read(len(block))
    return sums, digest.hexdigest()
