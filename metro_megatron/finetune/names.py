"""Names of classes, tags and labels: their order, and what is wrong with them."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

BOOLEAN = ("false", "true")
"""Classes of yes and no, in the order of the numbers 0 and 1."""
RTE = ("entailment", "not_entailment")
NLI = ("contradiction", "entailment", "neutral")
"""Classes of benchmarks."""
_SHOWN = 5


def ordered_names(labels: Iterable[str]) -> list[str]:
    """Every name once: numbers by size, else by alphabet."""
    names = set(labels)
    return sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names)


def id2label(names: Sequence[str]) -> dict[str, Any]:
    """The names as a model's configuration holds them."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def look_alikes(labels: Iterable[str]) -> list[str]:
    """A problem for each group of names that differ only in case, white space, forms of a character, or how a number is
    written."""
    groups: dict[str | float, set[str]] = {}
    for label in labels:
        groups.setdefault(_essence(label), set()).add(label)
    alike = [", ".join(map(_written(group), sorted(group))) for group in groups.values() if len(group) > 1]
    return [
        f"the labels {names} differ only in case, white space, characters or how a number is written; write them alike "
        "in both files"
        for names in alike
    ]


def unseen_names(names: Sequence[str], labels: Iterable[str]) -> list[str]:
    """The problem, if there is one, of validation labels that are not among the training file's names."""
    unseen = sorted(set(labels) - set(names))
    if not unseen:
        return []
    shown, known = (", ".join(map(repr, some[:_SHOWN])) for some in (unseen, names))
    return [f"{len(unseen)} validation labels are not in the training file: {shown}; it has {known}"]


def finite_number(text: str) -> float | None:
    """The number that a text writes, None if it is none."""
    try:
        number = math.nan if "_" in text else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _written(group: Iterable[str]) -> Callable[[str], str]:
    """How names are shown: by numbers of characters where they would look alike otherwise."""
    composed = [unicodedata.normalize("NFC", name) for name in group]
    return repr if len(set(composed)) == len(composed) else ascii


def _essence(label: str) -> str | float:
    number = finite_number(label)
    if number is not None:
        return number
    seen = (one for one in unicodedata.normalize("NFKC", label) if unicodedata.category(one) != "Cf")
    return " ".join("".join(seen).split()).casefold()


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
