"""What a file is by its first bytes, whatever it is called: compressed, of another encoding, or nothing that is read.

Names are wrong when a server compresses on the way, a download tool keeps the wrong ending, or an editor saves in its
own encoding. Without a look, each line would be counted as rejected, and no line would say why.
"""

import codecs
import re

FIRST_BYTES = 4096

_MARKS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh"}
_COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # pzstd begins with a frame to be skipped
    ".bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
_FOREIGN = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it (xz -d), or compress it with zstd or gzip",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it, or compress it with zstd or gzip",
    b"%PDF-": "a PDF; extract its text",
    b"ARROW1": "an Arrow file; write its table as Parquet",
    b"\xff\xfe\x00\x00": "UTF-32 text; convert it (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "UTF-32 text; convert it (iconv -f UTF-32 -t UTF-8)",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch that (git lfs pull)",
}
_UTF32 = re.compile(rb"(?:[\t-~]\x00\x00\x00){4}")
_FOREIGN_INSIDE = {
    _UTF32: "UTF-32 text; convert it (iconv -f UTF-32LE -t UTF-8)",
    re.compile(rb"(?:[\t-~]\x00){4}"): "UTF-16 text without a mark; convert it (iconv -f UTF-16LE -t UTF-8)",
    re.compile(rb"(?:\x00[\t-~]){4}"): "UTF-16 text without a mark; convert it (iconv -f UTF-16BE -t UTF-8)",
    re.compile(rb"[^\n]{257}ustar"): "a tar archive; unpack it",
}
_NO_JSON = {
    re.compile(
        rb"(?:(?:event|id|retry):[^\n]*\n)*+data:[ \t]*[{\[]"
    ): "a stream of events; keep their data (sed -n 's/^data: //p')",
    re.compile(rb"\{[ \t]*u?'"): "Python's spelling of dicts, not JSON; write it with json.dumps",
    re.compile(rb"<(?:!doctype|html|\?xml)", re.IGNORECASE): "HTML or XML, not JSON; fetch the data itself",
    re.compile(
        rb"\)\]\}'|(?:while|for) ?\([1; ]+\);"
        rb"|(?:/\*(?:[^*]|\*(?!/))*+\*/\s*+)?(?:(?:var|let|const)\s++)?[A-Za-z_$][\w$.]*+\s*+[(=]\s*+[{\[]"
    ): "JavaScript around JSON; take away what is before the first bracket, and what closes it",
}
"""How files begin, behind blanks, that are called JSON."""
_UTF16_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_UTF16_JSON = {"utf-16-le": re.compile(rb"(?:\s\x00)*+[{\[]\x00"), "utf-16-be": re.compile(rb"(?:\x00\s)*+\x00[{\[]")}
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*+\[(?:\s*+(?:[{\]]|\Z)|(?![^\n]*\][ \t\r]*\n\s*+\S))")
"""An array of objects; or of anything else, unless it is a line of several."""
_OVER_LINES = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+\{(?:"
    rb"(?:[^\n]*[,:{\[])?[ \t\r]*\n"
    rb"|[^\n]*\n\s*+[,:}\]]"
    rb'|[^\n]*\}[ \t\x1e]*\{"[^"\\\n]*"[ \t]*:)'
)
"""The line of a JSON object that goes on in the next one, which may begin with the comma; or that of several."""


def compression_of(first_bytes: bytes, by_name: str) -> str:
    """The ending of the compression that a file has, by_name where its bytes do not say it; "" for none.

    Servers and download tools unpack files and leave them their names.
    """
    for ending, begin in _COMPRESSED.items():
        if begin.match(first_bytes):
            return ending
    return "" if by_name and _is_text(first_bytes, _MARKS[by_name]) else by_name


def _is_text(first_bytes: bytes, mark: bytes) -> bool:
    """Whether they are printable UTF-8, and not what is left of a file that began with a mark."""
    if not first_bytes or first_bytes[: len(mark)] == mark[: len(first_bytes)]:
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first_bytes)
    except UnicodeDecodeError:
        return False
    return all(one.isprintable() or one.isspace() or one == "\ufeff" for one in text)


def encoding_of(first_bytes: bytes, *, is_json: bool) -> str:
    """Python's name of the encoding that a file, decompressed, has if that is UTF-16; else "".

    is_json: its name promises JSON, which tells UTF-16 without a mark.
    """
    if any(first_bytes.startswith(mark) for mark in _FOREIGN) or _UTF32.match(first_bytes):
        return ""
    marks = [encoding for mark, encoding in _UTF16_MARKS.items() if first_bytes.startswith(mark)]
    begins = [encoding for encoding, begin in _UTF16_JSON.items() if is_json and begin.match(first_bytes)]
    return "".join([*marks, *begins][:1])


def holds_json_values(first_bytes: bytes) -> bool:
    """Whether JSON is an array of objects, or has them over several lines or several in one, by how it begins behind
    blanks, decompressed, in UTF-8."""
    return bool(_ARRAY.match(first_bytes) or _OVER_LINES.match(first_bytes))


def misread(first_bytes: bytes, *, is_json: bool) -> str | None:
    """What a file is, decompressed, that is not read, and what to do; None for text, and JSON where its name promises
    it."""
    if compression_of(first_bytes, ""):
        return "is compressed twice; unpack it once"
    found = [what for mark, what in _FOREIGN.items() if first_bytes.startswith(mark)]
    found += [what for begin, what in _FOREIGN_INSIDE.items() if begin.match(first_bytes)]
    begin = first_bytes.removeprefix(codecs.BOM_UTF8).lstrip()
    found += [what for pattern, what in _NO_JSON.items() if is_json and pattern.match(begin)]
    return f"is {found[0]}" if found else None
