"""The bytes of input files: counted, hashed, decompressed and brought to UTF-8 while they are read.

Damage is told from the end of a file.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import zstandard

from metro_megatron.errors import UserError

BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 128
"""Compressed bytes per step; zstd expands at most 32,768-fold, so a step stays within 4 MiB."""
_LONGEST_WINDOW = 1 << 31
"""Bytes, those of `zstd --long=31`; a frame takes as much memory as its own window."""

_NOT_UTF8 = b"\xff"

_TOO_MUCH_MEMORY = re.compile("not enough memory|too much memory")
"""In messages of zstd's."""


class FileBytes(io.RawIOBase):
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

    def __init__(self, stored: BinaryIO):
        self._stored = stored
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._stored.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()
            self._output = memoryview(frame.decompress(self._input))
            self._input = frame.unused_data
            self._frame = None if frame.eof else frame
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


class _Utf8File(io.RawIOBase):
    """Text of another encoding as UTF-8. What is broken of it becomes bytes that are no UTF-8, where it stands."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream = stream
        # Half of a surrogate pair is spelled in bytes that no reader of UTF-8 takes for a character.
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._output = memoryview(b"")
        self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output and not self._is_over:
            self._output = memoryview(self._next())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _next(self) -> bytes:
        content = self._stream.read(BUFFER_BYTES)
        self._is_over = not content
        try:
            return self._decoder.decode(content, final=not content).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # the last character is cut
            return _NOT_UTF8


@contextmanager
def utf8_stream(stored: FileBytes, compression: str, encoding: str) -> Iterator[io.BufferedReader]:
    """The text of a file from its stored bytes; `compression` as `_decompressed`, an `encoding` of Python's or none.

    Raises UserError for what goes wrong while the context reads from it; leaves the file open.
    """
    with _decompressed(stored, compression) as stream:
        yield io.BufferedReader(_Utf8File(stream, encoding), BUFFER_BYTES) if encoding else stream


@contextmanager
def _decompressed(stored: FileBytes, compression: str) -> Iterator[io.BufferedReader]:
    """The content of a file from its stored bytes; `compression` is .gz, .zst, .bz2 or empty.

    Raises UserError for what goes wrong while the context reads from it; leaves the file open.
    """
    stream: io.BufferedReader = io.BufferedReader(stored, BUFFER_BYTES)
    try:
        if compression == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER_BYTES)  # type: ignore[arg-type]
        elif compression == ".zst":
            yield io.BufferedReader(_ZstdFile(stream), BUFFER_BYTES)
        elif compression == ".bz2":
            yield io.BufferedReader(bz2.BZ2File(stream), BUFFER_BYTES)  # type: ignore[arg-type]
        else:
            yield stream
    except (EOFError, zlib.error, zstandard.ZstdError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or _TOO_MUCH_MEMORY.search(str(error)):
            raise UserError(
                f"{stored.path}: decompressing it needs more memory than there is ({error or 'none left'}); raise the "
                "limit, use fewer workers, or compress it again with a smaller window (zstd without --long)"
            ) from error
        if not isinstance(error, OSError) or error.errno is None:  # bz2 and gzip call damage an OSError
            raise UserError(
                f"{stored.path}: {compression} data damaged or cut off after {stored.position:,} bytes "
                f"({error}); fetch or write the file again"
            ) from error
        raise UserError(f"{stored.path}: cannot be read ({error.strerror or error})") from error
    finally:
        stream.detach()
