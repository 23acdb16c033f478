"""What a file is by its first bytes, whatever it is called: compressed, or nothing that its name says.

Names are wrong when a server compresses on the way, a download tool keeps the wrong ending, or an editor saves in its
own encoding. Without a look, each line would be counted as rejected, and no line would say why.
"""

import re

FIRST_BYTES = 512

_COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
_FOREIGN = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it (xz -d), or compress it with zstd or gzip",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it, or compress it with zstd or gzip",
    b"%PDF-": "a PDF; extract its text",
    b"ARROW1": "an Arrow file; write its table as Parquet",
}
_TO_UTF8 = "convert it (iconv -f {0} -t UTF-8)"
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BZ2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
_INDENTED = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{[ \t\r]*\n\s*"')


def compression_of(first_bytes: bytes) -> str:
    """The ending of the compression that a file has; "" if none, or one that is not read."""
    for ending, mark in _COMPRESSED.items():
        if first_bytes.startswith(mark) and (ending != ".bz2" or _BZ2.match(first_bytes)):
            return ending
    return ""


def misread(first_bytes: bytes, *, is_json: bool) -> str | None:
    """What a file is, decompressed, that would give no document if it was read as text, and what to do.

    None for text; is_json: its name promises an object in every line.
    """
    for mark, what in _FOREIGN.items():
        if first_bytes.startswith(mark):
            return f"is {what}"
    for mark, encoding in _MARKS.items():
        if first_bytes.startswith(mark):
            return f"is {encoding} text (begins with {mark.hex(' ').upper()}), not UTF-8; {_TO_UTF8.format(encoding)}"
    if is_json and re.match(rb"\s*(?:[{\[]\x00|\x00[{\[])", first_bytes):
        encoding = "UTF-16LE" if first_bytes.lstrip()[1:2] == b"\x00" else "UTF-16BE"
        return f"is {encoding} text, not UTF-8; {_TO_UTF8.format(encoding)}"
    if is_json and _ARRAY.match(first_bytes):
        return "is one JSON array, not an object in every line; write one object a line (jq -c '.[]')"
    if is_json and _INDENTED.match(first_bytes):
        return "has JSON objects over several lines; write one object a line (jq -c .)"
    return None
