"""Writing a shard: streamed in bounded memory, under temporary names until all of it is on the disk.

Order of the final names: tokenizer folder, old manifest away, `.bin`, `.idx`, manifest. A shard without a
manifest is unfinished, whenever the process died.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.shards import (
    DTYPE_CODES,
    FORMAT_VERSION,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_VERSION,
    ShardPaths,
    token_dtype,
)
from metro_megatron.data.tokenizer import Tokenizer, copy_tokenizer
from metro_megatron.errors import UserError

_BLOCK = 1 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardWriter:
    """Appends documents, then `finish`es; used as a context that cleans up if `finish` was not reached.

    Raises UserError if the prefix is in use, is taken (unless `overwrite`), cannot be written, or the disk is
    full; `share_done` (0 to 1) serves to say how much space is needed then.
    """

    def __init__(
        self,
        prefix: str,
        tokenizer: Tokenizer,
        overwrite: bool = False,
        share_done: Callable[[], float] = lambda: 0.0,
    ):
        self.paths = ShardPaths(prefix)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.documents = self.units = self.tokens = 0
        self._tokenizer = tokenizer
        self._share_done = share_done
        check_output(prefix, overwrite)
        names = (str(self.paths.bin), str(self.paths.idx), f"{prefix}.lengths", f"{prefix}.documents")
        self._partials = [Path(f"{name}.partial") for name in names]
        self._files: list[BinaryIO] = []
        self._had_tokenizer = self.paths.tokenizer.exists()
        self._is_finished = False

    def __enter__(self) -> Self:
        try:
            with self._explained():
                self.paths.bin.parent.mkdir(parents=True, exist_ok=True)
                for path in self._partials:
                    self._files.append(_open_alone(path))
        except UserError:
            self.__exit__()
            raise
        self._bin, self._idx, self._lengths, self._documents = map(_HashedFile, self._files)
        self._documents.write(np.zeros(1, "<i8"))
        return self

    def __exit__(self, *exception: object) -> None:
        for file, path in zip(self._files, self._partials, strict=False):
            path.unlink(missing_ok=True)
            with suppress(OSError):
                file.close()
        if not self._is_finished and not self._had_tokenizer:
            shutil.rmtree(self.paths.tokenizer, ignore_errors=True)

    def append(
        self, tokens: NDArray[np.integer], unit_lengths: NDArray[np.int32], document_units: NDArray[np.int64]
    ) -> None:
        """Append whole documents: their ids [T], tokens per unit [U], units per document [D]."""
        if not len(document_units):
            return
        assert unit_lengths.sum() == len(tokens) and document_units.sum() == len(unit_lengths)
        with self._explained():
            self._bin.write(tokens.astype(self.dtype.newbyteorder("<"), copy=False))
            self._lengths.write(unit_lengths.astype("<i4", copy=False))
            self._documents.write((self.units + np.cumsum(document_units)).astype("<i8", copy=False))
        self.documents += len(document_units)
        self.units += len(unit_lengths)
        self.tokens += len(tokens)

    def finish(self, sources: list[dict[str, Any]], rejects: dict[str, int]) -> dict[str, Any]:
        """Write the index, bring all to the disk, then under its final name; returns the manifest."""
        assert self.documents > 0, "an empty shard is the caller's to refuse"
        with self._explained():
            self._write_index()
            manifest = {
                "format_version": FORMAT_VERSION,
                "tokenizer_sha256": self._tokenizer.sha256,
                "vocab_size": self._tokenizer.vocab_size,
                "documents": self.documents,
                "units": self.units,
                "tokens": self.tokens,
                "rejects": rejects,
                "sources": sources,
                "files": {"bin": self._bin.finish(), "idx": self._idx.finish()},
            }
            partial = Path(f"{self.paths.manifest}.partial")
            self._partials.append(partial)
            self._files.append(partial.open("wb"))
            self._files[-1].write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
            _sync(self._files[-1])
            copy_tokenizer(self._tokenizer.path, self.paths.tokenizer)
            self.paths.manifest.unlink(missing_ok=True)
            os.replace(self._partials[0], self.paths.bin)
            os.replace(self._partials[1], self.paths.idx)
            os.replace(partial, self.paths.manifest)
            self._is_finished = True
            _sync_folder(self.paths.bin.parent)
        return manifest

    def _write_index(self) -> None:
        header = INDEX_HEADER.pack(
            INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[self.dtype.name], self.units, self.documents + 1
        )
        self._idx.write(np.frombuffer(header, np.uint8))
        for lengths in self._lengths.blocks("<i4"):
            self._idx.write(lengths)
        offset = 0
        for lengths in self._lengths.blocks("<i4"):
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8"))
            offset = int(ends[-1])
        for documents in self._documents.blocks("<i8"):
            self._idx.write(documents)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the file system refuses into a UserError."""
        try:
            yield
        except OSError as error:
            folder = self.paths.bin.parent
            if error.errno not in _NO_SPACE:
                raise UserError(
                    f"cannot write {self.paths.prefix}: {error.strerror} ({error.filename})"
                ) from error
            written = sum(path.stat().st_size for path in self._partials if path.exists())
            needed = (
                f"about {written / done / 1e6:,.1f} MB" if (done := self._share_done()) > 0.01 else "more"
            )
            raise UserError(
                f"cannot write {self.paths.prefix}: {error.strerror} after {written / 1e6:,.1f} MB; "
                f"the shard needs {needed}, {folder} had "
                f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free beside that. "
                "Free some space or choose another --output_prefix; nothing that was there is damaged"
            ) from error


class _HashedFile:
    """A file of arrays, hashed and counted while written; its content can be read back in blocks."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def blocks(self, dtype: str) -> Iterator[NDArray[Any]]:
        self._file.seek(0)
        while data := self._file.read(_BLOCK):
            yield np.frombuffer(data, dtype)
        assert self._file.tell() == self._bytes

    def finish(self) -> dict[str, Any]:
        _sync(self._file)
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def check_output(prefix: str, overwrite: bool) -> None:
    """Raise UserError if a shard can not be written at `prefix`, before any work is done."""
    paths = ShardPaths(prefix)
    if not paths.bin.name.removesuffix(".bin") or Path(prefix).is_dir():
        raise UserError(
            f"--output_prefix {prefix} names a folder; append a file name, for example {prefix}/train"
        )
    existing = [path for path in (paths.manifest, paths.bin, paths.idx, paths.tokenizer) if path.exists()]
    if existing and not overwrite:
        what = "a finished shard" if existing[0] == paths.manifest else f"{existing[0]}"
        raise UserError(
            f"--output_prefix {prefix}: {what} is there already; choose another or add --overwrite"
        )


def _open_alone(path: Path) -> BinaryIO:
    """Open for writing and reading, refusing a file that another process is writing."""
    file = path.open("a+b")
    is_ours = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_ours = False
    except OSError:
        pass  # a file system without locks
    if not is_ours:
        file.close()
        raise UserError(f"{path} is being written by another process; choose another --output_prefix")
    file.truncate(0)
    return file


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
