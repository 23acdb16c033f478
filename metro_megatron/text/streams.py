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

_RETURNS = re.compile(rb"\r++(?!\n)")
"""Those in front of a \\n, of which a bad conversion leaves several, belong to it."""

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


class _BlockStream(io.RawIOBase):
    """Blocks of bytes, one after another, as a stream."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._output = memoryview(block)
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _buffered(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_BlockStream(blocks), BUFFER_BYTES)


def _unzstd(stored: BinaryIO) -> Iterator[bytes]:
    """Decompressed bytes of a zstd file of any number of frames. Raises EOFError if the last one is cut off."""
    frame: zstandard.ZstdDecompressionObj | None = None
    while content := stored.read(_ZSTD_INPUT_BYTES):
        while content:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()
            yield frame.decompress(content)
            content = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")


def _as_utf8(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Text of another encoding as UTF-8. What is broken of it becomes bytes that are no UTF-8, where it stands."""
    # Half of a surrogate pair is spelled in bytes that no reader of UTF-8 takes for a character.
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    while content := stream.read(BUFFER_BYTES):
        yield decoder.decode(content).encode("utf-8", "surrogatepass")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:  # the last character is cut
        yield _NOT_UTF8


def _with_line_ends(stream: BinaryIO) -> Iterator[bytes]:
    """UTF-8 in which old Macs' line ends, \\r alone, are \\n: byte for byte, so that places in it stay."""
    held = b""
    while content := stream.read(BUFFER_BYTES):
        block = held + content
        # What follows says whether they are a line end of their own; of nothing else there may be any number.
        whole = block.rstrip(b"\r") or block
        held = block[len(whole) :]
        yield _RETURNS.sub(lambda returns: b"\n" * len(returns[0]), whole) if b"\r" in whole else whole
    yield b"\n" * len(held)


@contextmanager
def utf8_stream(stored: FileBytes, compression: str, encoding: str) -> Iterator[io.BufferedReader]:
    """The text of a file from its stored bytes; `compression` as `_decompressed`, an `encoding` of Python's or none.
    Its lines end in \\n or \\r\\n, whatever they end in on the disk.

    Raises UserError for what goes wrong while the context reads from it; leaves the file open.
    """
    with _decompressed(stored, compression) as stream:
        yield _buffered(_with_line_ends(_buffered(_as_utf8(stream, encoding)) if encoding else stream))


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
            yield _buffered(_unzstd(stream))
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
