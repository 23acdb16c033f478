"""Prose of Debian's documentation: the paragraphs of HTML pages, without what is no English sentence."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.text.debian import dependencies, fetch_packages

PACKAGES = (
    *("anarchism", "apache2-doc", "cmake-doc", "debian-policy", "exim4-doc-html", "git-doc", "libreoffice-help-en-us"),
    *("maxima-doc", "nodejs-doc", "octave-doc", "python-django-doc", "python-sqlalchemy-doc", "r-doc-html"),
    *("sqlite3-doc", "swi-prolog-doc"),
)
"""Not among them: manpages, of which tasks are made."""
VERSIONED = ("linux-doc", "postgresql-doc", "python3-doc")
"""Empty packages, each of which depends on the one of Debian's version."""

_PAGE = re.compile(r"\.html?(\.en)?$")
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strike|"
    "strong|sub|sup|time|tt|u|var|wbr"
)
"""Names of the elements that are words of a line; all others are blocks."""
_LEFT_OUT = {"script", "style", "pre", "head", "nav", "table", "header", "footer"}
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
"""Gopher's (arXiv 2112.11446, appendix A): a text without two of them is no English."""
_FEWEST_WORDS = 8
_ENDS = (".", "!", "?", ":", '"', "”", ")")
"""C4 keeps lines that end so (arXiv 1910.10683, section 2.2), but for the colon and the bracket."""


def fetch_documentation(folder: Path) -> None:
    """Download the packages, about 100 MB, and unpack them below folder. Raises UserError where that cannot be done."""
    fetch_packages(folder, [*PACKAGES, *dependencies(VERSIONED)])


def read_documentation(folder: Path) -> Iterator[str]:
    """The text of every HTML page below folder, in the order of paths: a line for each paragraph that is_prose.

    A paragraph that an earlier page has is left out, and so are pages without others: licences, notes on every page.
    Raises UserError where there is no page.
    """
    paths = sorted(path for path in folder.rglob("*") if _PAGE.search(path.name) and path.is_file())
    paths = [path for path in paths if not path.is_symlink()]
    if not paths:
        raise UserError(f"{folder}: holds no HTML page; it must hold the unpacked packages {', '.join(PACKAGES)}")
    seen: set[str] = set()
    with ProcessPoolExecutor() as pool:
        for page in pool.map(read_page, paths, chunksize=64):
            new = _not_seen(page, seen)
            if new:
                yield "\n".join(new)


def read_page(path: Path) -> list[str]:
    """The paragraphs of a page that are prose."""
    return list(filter(is_prose, paragraphs(path.read_text(encoding="utf-8", errors="replace"))))


def paragraphs(page: str) -> list[str]:
    """What stands between the block elements of an HTML page, without code, tables and navigation."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return parser.found


def is_prose(paragraph: str) -> bool:
    """Eight words or more, two of English's most frequent ones among them, and the end of a sentence."""
    words = paragraph.lower().split()
    return len(words) >= _FEWEST_WORDS and paragraph.endswith(_ENDS) and len(_STOP_WORDS.intersection(words)) >= 2


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._pieces: list[str] = []
        self._left_out: list[str] = []
        """The elements that are open, of those whose content is left out."""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._end_block(tag)
        if tag in _LEFT_OUT:
            self._left_out.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._end_block(tag)
        if tag in self._left_out:
            # What was open in it is closed, too.
            del self._left_out[self._left_out.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self._pieces.append(data)

    def close(self) -> None:
        super().close()
        self._end_block("html")

    def _end_block(self, tag: str) -> None:
        if _INLINE.fullmatch(tag):
            return
        text = " ".join("".join(self._pieces).split())
        self._pieces.clear()
        if text:
            self.found.append(text)


def _not_seen(page: Iterable[str], seen: set[str]) -> list[str]:
    new = [paragraph for paragraph in dict.fromkeys(page) if paragraph not in seen]
    seen.update(new)
    return new
