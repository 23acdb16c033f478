"""Questions about a context, and where their answers stand in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from metro_megatron.errors import UserError

Answers: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Question:
    """A question and its answers, each with its first character; () where there is none, None where it is unknown."""

    question: str
    context: str
    answers: Answers | None
    id: Any = field(default=None, compare=False)
    moved: int = field(default=0, compare=False)
    """Answers that stand elsewhere in the context than was said."""

    @property
    def is_labelled(self) -> bool:
        return self.answers is not None


def answers_of(context: str, value: Any, start: Any = None) -> tuple[Answers, int]:
    """The answers as they stand in a file, and how many stand elsewhere than is said there.

    `value` is an object of lists `text` and `answer_start`, a list of objects of one each, or a string, whose first
    character `start` may be; nothing at all is no answer. An answer that is not where it should be is looked for, the
    nearest place first: SQuAD has some. Raises UserError if it is nowhere.
    """
    found, moved = [], 0
    for text, begin in _pairs(value, start):
        if not text.strip():
            continue
        place = _place(context, text, begin)
        if place < 0:
            raise UserError(f"answer {text!r} is not in its context, as it is written")
        moved += begin is not None and begin != place
        found.append((text, place))
    return tuple(found), moved


def _pairs(value: Any, start: Any) -> Iterator[tuple[str, int | None]]:
    if value is None:
        return
    texts: Any
    starts: Any
    if isinstance(value, str):
        texts, starts = [value], [start]
    elif isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start") or ([None] * len(texts) if isinstance(texts, list) else None)
    else:
        one_each = isinstance(value, list) and all(isinstance(one, dict) for one in value)
        texts, starts = ([one.get(name) for one in value] if one_each else None for name in ("text", "answer_start"))
    is_right = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not is_right or not all(isinstance(text, str) for text in texts):
        raise UserError(f"answers is {value!r}; give a string, or an object of lists text and answer_start")
    for text, begin in zip(texts, starts, strict=True):
        yield text, _position(begin)


def _position(value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise UserError(f"answer_start is {value!r}, must be a number of characters")
    return int(number)


def _place(context: str, text: str, begin: int | None) -> int:
    """Where the text stands: at `begin`, else next to it; the first place without it; -1 for nowhere."""
    if begin is None:
        return context.find(text)
    if begin >= 0 and context.startswith(text, begin):
        return begin
    before, after = context.rfind(text, 0, max(0, begin) + len(text)), context.find(text, max(0, begin))
    places = [place for place in (before, after) if place >= 0]
    return min(places, key=lambda place: abs(place - begin), default=-1)
