"""Dictionaries of the dict protocol's server: NAME.index and NAME.dict.dz."""

import gzip
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from metro_megatron.errors import UserError

_DIGITS = {digit: value for value, digit in enumerate(f"{ascii_uppercase}{ascii_lowercase}{digits}+/")}
_ABOUT_ITSELF = ("00database", "00-database")
"""Headwords that tell of the dictionary."""


@dataclass(frozen=True)
class Entry:
    """One article."""

    headword: str
    text: str
    """As it is printed, its own headline included."""


@dataclass(frozen=True)
class Dictionary:
    """All articles, each once, and why others were left out."""

    entries: list[Entry]
    rejects: Counter[str]


def read_dictionary(stem: Path) -> Dictionary:
    """The dictionary with files STEM.index and STEM.dict.dz, in the order of its index.

    Lines of the index whose numbers cannot be read or lie outside the text, articles that are empty or not UTF-8, and
    further headwords of the same article are counted as rejects. Raises UserError for missing or damaged files.
    """
    index, packed = stem.with_name(f"{stem.name}.index"), stem.with_name(f"{stem.name}.dict.dz")
    for path in (index, packed):
        if not path.is_file():
            raise UserError(f"{path}: no such file; install or download the package dict-{stem.name}")
    try:
        text = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{packed}: damaged ({error}); download the package dict-{stem.name} again") from error
    entries: list[Entry] = []
    rejects: Counter[str] = Counter()
    seen: set[int] = set()
    for line in index.read_bytes().split(b"\n"):
        if not line:
            continue
        found = _entry(line, text, seen)
        if isinstance(found, Entry):
            entries.append(found)
        elif found:
            rejects[found] += 1
    return Dictionary(entries, rejects)


def _entry(line: bytes, text: bytes, seen: set[int]) -> Entry | str:
    """An article, or why it is none; empty for articles about the dictionary."""
    try:
        headword, *numbers = line.decode().split("\t")
        offset, length = (decode_number(number) for number in numbers[:2])
    except (ValueError, KeyError):
        return "unreadable line of the index"
    if headword.startswith(_ABOUT_ITSELF):
        return ""
    if offset + length > len(text):
        return "outside the text"
    if offset in seen:
        return "another headword of the same article"
    try:
        article = text[offset : offset + length].decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    if not headword.strip() or not article.strip():
        return "empty"
    seen.add(offset)
    return Entry(headword.strip(), article)


def decode_number(text: str) -> int:
    """A number in dictd's base 64, the most significant digit first. Raises KeyError, ValueError for none."""
    if not text:
        raise ValueError("no digits")
    value = 0
    for digit in text:
        value = value << 6 | _DIGITS[digit]
    return value
