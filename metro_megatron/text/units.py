"""What a document is cut into: samples are whole units of one document."""

import re
from collections.abc import Callable, Iterator

_END = re.compile(r"""([.!?…]["'”’)\]]?)[ ]+(?=["'“‘(\[]?[A-Z0-9À-ÖØ-Þ])""")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Ms|Dr|St|vs|No|pp|cf|Jr|Sr|al|Mrs|etc|Fig|Vol|Rev|Gen|Col|Sen|Rep|Gov|Inc|Ltd"
    r"|e[.]g|i[.]e|Prof|Capt)\Z"
)
_LONGEST_ABBREVIATION = 4


def lines(text: str) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def sentences(text: str) -> list[str]:
    """Every line cut behind `.`, `!`, `?` or `…` (and a closing quote or bracket) where spaces and then a capital
    or a digit follow; not behind an initial or a common English abbreviation."""
    return [sentence for line in lines(text) for sentence in _cut(line)]


def _cut(line: str) -> Iterator[str]:
    begin = 0
    for match in _END.finditer(line):
        stop = match.start()
        if match[1] == "." and _ABBREVIATION.search(line, max(0, stop - _LONGEST_ABBREVIATION), stop):
            continue
        yield line[begin : match.end(1)]
        begin = match.end()
    yield line[begin:]


UNITS: dict[str, Callable[[str], list[str]]] = {"line": lines, "sentence": sentences}
