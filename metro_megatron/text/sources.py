"""Input files as streams of bytes: counted, hashed, decompressed; damage is told from the end of the file."""

import bz2
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import zstandard

from metro_megatron.errors import UserError

BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 128
"""Compressed bytes per step; zstd expands at most 32,768-fold, so a step stays within 4 MiB."""


class Source(io.RawIOBase):
    """A file from byte `start` on, which counts its bytes (`position`) and hashes those of [begin, end)."""

    def __init__(self, path: str, begin: int = 0, end: int | None = None, start: int | None = None):
        self.path = path
        self.position = begin if start is None else start
        self._begin, self._end = begin, end
        self._hash = hashlib.sha256()
        try:
            self._file = io.FileIO(path)
            self._file.seek(self.position)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer) or 0
        first = max(0, self._begin - self.position)
        last = count if self._end is None else min(count, self._end - self.position)
        if first < last:
            self._hash.update(memoryview(buffer)[first:last])
        self.position += count
        return count

    def finish(self) -> str:
        """Read on to the end, close, and return the SHA-256 of bytes [begin, end)."""
        while (self._end is None or self.position < self._end) and self.read(BUFFER_BYTES):
            pass
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a zstd file of any number of frames; EOFError if the last one is cut off."""

    def __init__(self, source: BinaryIO):
        self._source = source
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._source.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(frame.decompress(self._input))
            self._input = frame.unused_data
            self._frame = None if frame.eof else frame
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


@contextmanager
def decompressed(source: Source, compression: str) -> Iterator[io.BufferedReader]:
    """The source's content; `compression` is .gz, .zst, .bz2 or empty.

    Raises UserError for what goes wrong while the context reads from it; leaves the source open.
    """
    stream: io.BufferedReader = io.BufferedReader(source, BUFFER_BYTES)
    try:
        if compression == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER_BYTES)  # type: ignore[arg-type]
        elif compression == ".zst":
            yield io.BufferedReader(_ZstdFile(stream), BUFFER_BYTES)
        elif compression == ".bz2":
            yield io.BufferedReader(bz2.BZ2File(stream), BUFFER_BYTES)  # type: ignore[arg-type]
        else:
            yield stream
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # bz2 and gzip call damage an OSError
            raise UserError(
                f"{source.path}: {compression} data damaged or cut off after {source.position:,} bytes "
                f"({error}); fetch or write the file again"
            ) from error
        raise UserError(f"{source.path}: cannot be read ({error.strerror or error})") from error
    finally:
        stream.detach()
