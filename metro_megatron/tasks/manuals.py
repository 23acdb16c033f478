"""Manuals in roff with the macros of man: their sections as words, of which fonts say what they are.

Bold is what is typed or called, italic what stands for something or is a file name (man-pages(7)).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from metro_megatron.probing.kinds import OUTSIDE

_FONT = re.compile(r"\\f(?:\[(\w*)\]|\((\w\w)|(.))")
_ESCAPES = (
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\\((?:aq|cq|oq|ga)|\\\[(?:aq|cq|oq|ga)\]"), "'"),
    (re.compile(r"\\\((?:dq|lq|rq)|\\\[(?:dq|lq|rq)\]"), '"'),
    (re.compile(r"\\\((?:em|en)|\\\[(?:em|en)\]"), "-"),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\[*n]?(?:\(..|\[[^\]]*\])|\\\*.|\\s[+-]?\d+|\\[&|^/,:%!]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\e"), "\\\\"),
    (re.compile(r"\\(.)"), r"\1"),
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_PARAGRAPHS = {"PP", "P", "LP", "TP", "IP", "HP", "TQ"}
_VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE"}
_OPENING = "([\"'<{"


@dataclass(frozen=True)
class Word:
    """A word and its font: B, I or R."""

    text: str
    font: str

    @property
    def tag(self) -> str:
        """option, file, code, or OUTSIDE."""
        bare = self.text.lstrip(_OPENING)
        is_file = bare.startswith(("/", "~/")) and len(bare) > 2
        if self.font == "B":
            return "option" if bare.startswith("-") else "file" if is_file else "code"
        return "file" if self.font == "I" and is_file else OUTSIDE


@dataclass
class Section:
    """A section and its paragraphs; what is set verbatim is left out."""

    title: str
    paragraphs: list[list[Word]] = field(default_factory=list)


@dataclass(frozen=True)
class Manual:
    """A manual."""

    names: tuple[str, ...]
    summary: str
    sections: list[Section]
    """All but NAME."""


def read_manual(path: Path) -> Manual | None:
    """The manual in a file, compressed or not; None for one without a summary, such as a link to another."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        return None
    sections = parse_sections(raw.decode(errors="replace"))
    heading = next((one for one in sections if one.title.upper() == "NAME"), None)
    line = " ".join(word.text for paragraph in heading.paragraphs for word in paragraph) if heading else ""
    names, dash, summary = line.partition(" - ")
    if not dash or not summary.strip():
        return None
    others = [section for section in sections if section is not heading]
    return Manual(tuple(name.strip() for name in names.split(",")), summary.strip(), others)


def parse_sections(source: str) -> list[Section]:
    """The sections of a manual's source."""
    sections: list[Section] = []
    pieces: list[tuple[str, str]] = []
    """Text and font of the paragraph so far."""

    def close() -> None:
        if sections and (words := _words(pieces)):
            sections[-1].paragraphs.append(words)
        pieces.clear()

    awaited = ""
    for line in source.replace("\\\n", "").splitlines():
        macro, rest = _macro(line)
        if awaited:
            awaited = "" if macro == awaited else awaited
        elif macro in _VERBATIM:
            awaited = _VERBATIM[macro]
        elif macro == "SH":
            close()
            sections.append(Section(" ".join(_arguments(rest))))
        elif macro == "SS" or macro in _PARAGRAPHS:
            close()
            if macro == "IP":
                pieces += [*_runs(" ".join(_arguments(rest)[:1]), "R"), (" ", "R")]
        elif macro in ("B", "I"):
            pieces += [*_runs(" ".join(_arguments(rest)), macro), (" ", "R")]
        elif macro in _ALTERNATING:
            for number, argument in enumerate(_arguments(rest)):
                pieces += _runs(argument, macro[number % 2])
            pieces.append((" ", "R"))
        elif not macro:
            pieces += [*_runs(line, "R"), (" ", "R")]
    close()
    return sections


def _macro(line: str) -> tuple[str, str]:
    """Name of a request and the rest of its line; ("", "") for text, and a name of no meaning for comments."""
    if not line.startswith((".", "'")):
        return "", ""
    name, _, rest = line[1:].strip().partition(" ")
    return name or "\\", rest.strip()


def _arguments(rest: str) -> list[str]:
    return [quoted.replace('""', '"') if quoted or not plain else plain for quoted, plain in _ARGUMENT.findall(rest)]


def _runs(text: str, font: str) -> Iterator[tuple[str, str]]:
    """Text of one font after another, without escapes; \\fP and what is unknown go back to `font`."""
    current, begin = font, 0
    for match in _FONT.finditer(text):
        yield _plain(text[begin : match.start()]), current
        wanted = match[1] or match[2] or match[3] or "P"
        bold_or_italic = next((one for one in "BI" if one in wanted), None)
        current = bold_or_italic or ("R" if wanted == "R" else font)
        begin = match.end()
    yield _plain(text[begin:]), current


def _plain(text: str) -> str:
    for pattern, replacement in _ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def _words(pieces: list[tuple[str, str]]) -> list[Word]:
    """Words between white space, each in the font of its first letter that opens no bracket."""
    letters = [(letter, font) for text, font in pieces for letter in text]
    words: list[Word] = []
    begin = 0
    for end in range(len(letters) + 1):
        if end < len(letters) and not letters[end][0].isspace():
            continue
        if end > begin:
            text = "".join(letter for letter, _ in letters[begin:end])
            first = min(len(text) - len(text.lstrip(_OPENING)), len(text) - 1)
            words.append(Word(text, letters[begin + first][1]))
        begin = end + 1
    return words
