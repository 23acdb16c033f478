"""Real text for benchmarks: the files of Debian's documentation packages as JSON Lines."""

import gzip
import html
import re
from collections.abc import Iterator
from pathlib import Path

import orjson

PACKAGES = (
    "dict-gcide",
    "dict-wn",
    "dict-foldoc",
    "anarchism",
    "perl-doc",
    "python3.11-doc",
    "linux-doc-6.1",
    "postgresql-doc-15",
)
"""English of several kinds; with Debian 12, about 150 MB of text."""

DOCUMENT_CHARACTERS = 20_000
"""Longer files are cut at paragraphs into documents of about this size."""

_TAGS = re.compile(r"<(script|style|head)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_EXTRA_BLANKS = re.compile(r"[ \t]*\n(?:[ \t]*\n)+")
_ENDINGS = (".txt", ".html", ".rst", ".pod", ".dict", ".md")


def write_corpus(folder: Path, output: Path, max_bytes: int) -> int:
    """Write the documents of all text files below `folder` as JSON Lines, up to `max_bytes` of text.

    Returns the bytes of text. Equal folders give equal files; every n-th document of all is taken, so that each
    kind of text keeps its share.
    """
    documents = list(_documents(folder))
    total = sum(len(document.encode()) for document in documents)
    step = max(1.0, total / max_bytes)
    size = 0
    with output.open("wb") as file:
        for k in range(int(len(documents) / step)):
            text = documents[int(k * step)]
            if size + len(text.encode()) <= max_bytes:
                size += len(text.encode())
                file.write(orjson.dumps({"text": text}) + b"\n")
    return size


def _documents(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.name.removesuffix(".gz").removesuffix(".dz")
        if not name.endswith(_ENDINGS) or path.is_symlink() or not path.is_file():
            continue
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw).decode(errors="replace")
        if name.endswith(".html"):
            text = html.unescape(_TAGS.sub("", text))
        yield from _pieces(_EXTRA_BLANKS.sub("\n\n", text.replace("\0", "")).strip())


def _pieces(text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = text.find("\n\n", begin + DOCUMENT_CHARACTERS)
        end = len(text) if end < 0 else end
        if piece := text[begin:end].strip():
            yield piece
        begin = end
