"""What a file is by its first bytes, whatever it is called: compressed, of another encoding, or nothing that is read.

Names are wrong when a server compresses on the way, a download tool keeps the wrong ending, or an editor saves in its
own encoding. Without a look, each line would be counted as rejected, and no line would say why.
"""

import re

FIRST_BYTES = 4096

_COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
_FOREIGN = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it (xz -d), or compress it with zstd or gzip",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it, or compress it with zstd or gzip",
    b"%PDF-": "a PDF; extract its text",
    b"ARROW1": "an Arrow file; write its table as Parquet",
    b"\xff\xfe\x00\x00": "UTF-32 text; convert it (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "UTF-32 text; convert it (iconv -f UTF-32 -t UTF-8)",
}
_UTF16_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_UTF16_JSON = {"utf-16-le": re.compile(rb"(?:\s\x00)*+[{\[]\x00"), "utf-16-be": re.compile(rb"(?:\x00\s)*+\x00[{\[]")}
_BZ2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*+\[\s*+(?:[{\]]|\Z)")
_OVER_LINES = re.compile(rb"(?:\xef\xbb\xbf)?\s*+\{(?:[^\n]*[,:{\[])?[ \t\r]*\n")
"""The line of a JSON object that goes on in the next one."""


def compression_of(first_bytes: bytes) -> str:
    """The ending of the compression that a file has; "" if none, or one that is not read."""
    for ending, mark in _COMPRESSED.items():
        if first_bytes.startswith(mark) and (ending != ".bz2" or _BZ2.match(first_bytes)):
            return ending
    return ""


def encoding_of(first_bytes: bytes, *, is_json: bool) -> str:
    """Python's name of the encoding that a file, decompressed, has if that is UTF-16; else "".

    is_json: its name promises JSON, which tells UTF-16 without a mark.
    """
    if any(first_bytes.startswith(mark) for mark in _FOREIGN):
        return ""
    marks = [encoding for mark, encoding in _UTF16_MARKS.items() if first_bytes.startswith(mark)]
    begins = [encoding for encoding, begin in _UTF16_JSON.items() if is_json and begin.match(first_bytes)]
    return "".join([*marks, *begins][:1])


def holds_json_values(first_bytes: bytes) -> bool:
    """Whether JSON is an array of objects or has them over several lines, by how it begins, decompressed, in UTF-8."""
    return bool(_ARRAY.match(first_bytes) or _OVER_LINES.match(first_bytes))


def misread(first_bytes: bytes) -> str | None:
    """What a file is, decompressed, that is not read, and what to do; None for text."""
    for mark, what in _FOREIGN.items():
        if first_bytes.startswith(mark):
            return f"is {what}"
    return None
