"""JSON objects in one array, or over several lines one after another: cut into records in bounded memory.

Only what says where a value ends is looked at, strings and brackets, by regular expressions; each value is parsed on
its own later, so that one that is broken costs itself. Here instead of ijson, which parses (numbers to Decimal), and
ends a file at its first wrong byte.
"""

import re
from collections.abc import Iterator
from io import BufferedReader

from metro_megatron.text.records import Record, Reject

_BUFFER_BYTES = 1 << 20
_LONGEST_GAP = 1 << 16
"""White space before an object at which reading goes on behind damage, in bytes."""
_WORDS = (b"true", b"false", b"null", b"NaN", b"Infinity")

_BETWEEN = re.compile(rb"(?:[ \t\r\n,\x1e]|\xef\xbb\xbf)*+")
"""Of values of an array or a file; files with byte order marks may have been joined, and RFC 7464 puts 1E before each
value."""
_RUN = re.compile(
    rb'(?:[:, \t\r\n]++|"(?:[^"\\]++|\\.)*+"|[0-9.eE+-]++|true|false|null|NaN|-?Infinity)*+',
    re.DOTALL,
)
"""All between two brackets that stand in no string, if the buffer holds it."""
_IN_STRING = re.compile(rb"(?:[^\"\\]++|\\.)*+", re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\r\n,\[\]{}]++")
_NEXT_OBJECT = re.compile(rb'(?:[,\x1e]\s*+|\n)(?=\{\s*+")')
"""Where reading goes on behind damage: in no string, as quotes and line ends in one are spelled with a backslash."""
_WHITE = b" \t\r\n"


class _Damage(Exception):
    """Brackets that do not match, or what is no JSON outside of strings."""


class _End(Exception):
    """The file ends inside a value."""


def json_values(stream: BufferedReader, max_bytes: int) -> Iterator[Record]:
    """The values in a stream's arrays, of arrays in them, too, or beside them, in order; too long ones as a reason.

    Behind what is damaged, reading goes on at the next object that follows a comma or begins a line.
    """
    return _Scanner(stream, max_bytes).records()


class _Scanner:
    """A buffer of a stream, and where in it the next byte is.

    What is kept of a value that began in an earlier buffer is in `_kept`, unless it is longer than allowed.
    """

    def __init__(self, stream: BufferedReader, max_bytes: int):
        self._stream, self._limit = stream, max_bytes
        self._buffer = b""
        self._offset, self._next, self._first = 0, 0, 0
        """Of the buffer in the stream; in the buffer, of the next byte and of the value's first."""
        self._kept: list[bytes] = []
        self._size = 0
        """Bytes of the value in earlier buffers."""
        self._damage = -1
        """Offset of the last damage."""

    def records(self) -> Iterator[Record]:
        open_arrays = 0
        while first := self._skip_between():
            self._begin_value()
            position = self._offset + self._next
            if first in (b"[", b"]"):
                open_arrays = max(0, open_arrays + (1 if first == b"[" else -1))
                self._next += 1
                continue
            try:
                if first != b"{" and not open_arrays:
                    raise _Damage
                self._value()
                yield Record(position, self._raw(), is_json=True)
            except _Damage:
                yield Record(position, Reject.INVALID_JSON, is_json=True)
                self._resynchronize()
            except _End:
                yield Record(position, Reject.CUT_OFF, is_json=True)
                return
        if open_arrays:
            yield Record(self._offset + self._next, Reject.CUT_OFF, is_json=True)

    def _skip_between(self) -> bytes:
        """Go to the next value or bracket of an array; its first byte, none at the end."""
        while True:
            self._next = _BETWEEN.match(self._buffer, self._next).end()  # type: ignore[union-attr]  # matches anything
            # A mark may be cut.
            if len(self._buffer) - self._next >= len("\ufeff".encode()):
                break
            self._begin_value()
            if not self._more():
                break
        return self._buffer[self._next : self._next + 1]

    def _begin_value(self) -> None:
        self._kept.clear()
        self._size, self._first = 0, self._next

    def _raw(self) -> bytes | Reject:
        """The value that ends before the next byte."""
        size = self._size + self._next - self._first
        if size > self._limit:
            return Reject.TOO_LONG
        return b"".join([*self._kept, self._buffer[self._first : self._next]])

    def _more(self) -> bool:
        """Read on, and let go of what is before the value, or before the next byte if that is too long."""
        self._size += self._next - self._first
        self._kept.append(self._buffer[self._first : self._next])
        if self._size > self._limit:
            self._kept.clear()
        self._offset += self._next
        read = self._stream.read(_BUFFER_BYTES)
        self._buffer = self._buffer[self._next :] + read
        self._next = self._first = 0
        return bool(read)

    def _value(self) -> None:
        """Go to the end of a value."""
        if self._buffer[self._next] != b"{"[0]:
            self._scalar()
            return
        open_brackets = bytearray()
        before = b":"
        while True:
            before = self._run(before)
            bracket = self._buffer[self._next : self._next + 1]
            self._next += 1
            if bracket in (b"{", b"["):
                # In an object, only a colon comes before a bracket: where two objects follow one another, one is open.
                if (open_brackets[-1:] == b"{" and before != b":") or len(open_brackets) > self._limit:
                    raise _Damage
                open_brackets += bracket
            elif open_brackets.pop() != bracket[0] - 2:  # { and }, [ and ] are two apart
                raise _Damage
            if not open_brackets:
                return
            before = bracket

    def _scalar(self) -> None:
        if self._buffer[self._next] == b"}"[0]:
            raise _Damage
        if self._buffer[self._next] == b'"'[0]:
            self._string()
            return
        while match := _SCALAR.match(self._buffer, self._next):
            self._next = match.end()
            if self._next < len(self._buffer) or not self._more():
                return

    def _run(self, before: bytes) -> bytes:
        """Go to the next bracket outside of strings; the last byte before it that is no white space."""
        while True:
            begin, match = self._next, _RUN.match(self._buffer, self._next)
            assert match
            self._next = match.end()
            before = self._buffer[begin : self._next].rstrip(_WHITE)[-1:] or before
            following = self._buffer[self._next : self._next + 1]
            if following and following in b"{}[]":
                return before
            if following == b'"':
                self._string()
                before = b'"'
            elif not any(word.startswith(self._buffer[self._next :]) for word in _WORDS):
                raise _Damage
            elif not self._more():
                raise _End

    def _string(self) -> None:
        """Go behind the end of a string, which may not be in the buffer."""
        self._next += 1
        while True:
            self._next = _IN_STRING.match(self._buffer, self._next).end()  # type: ignore[union-attr]
            if self._buffer[self._next : self._next + 1] == b'"':
                self._next += 1
                return
            if not self._more():
                raise _End

    def _resynchronize(self) -> None:
        """Go to the next object behind the first byte of the value, as far as it is kept.

        If that one ends in the same damage, those in it do, too: then to the next one behind it.
        """
        earlier, self._damage = self._damage, self._offset + self._next
        if self._size <= self._limit and self._damage != earlier:
            kept = b"".join(self._kept)
            self._buffer, self._offset = kept + self._buffer, self._offset - len(kept)
            self._next = (0 if kept else self._first) + 1
        while not (match := _NEXT_OBJECT.search(self._buffer, self._next)):
            # What says that an object begins may be cut: white space of any length may be in it.
            begin = max(self._next, len(self._buffer.rstrip(b"{" + _WHITE)) - 1)
            self._next = begin if len(self._buffer) - begin < _LONGEST_GAP else len(self._buffer)
            self._begin_value()
            if not self._more():
                self._next = len(self._buffer)
                return
        self._next = match.end()
