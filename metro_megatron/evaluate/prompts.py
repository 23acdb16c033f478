"""Candidates in their prompts: what a language model is asked to choose from, without training.

An item is a JSON object of a line:

    {"template": "The capital of France is {candidate}.", "candidates": ["Paris", "Rome"], "label": "Paris"}
    {"text": "A lovely film.", "template": "{text} It was {candidate}.", "candidates": ["great", "bad"], "label": 0}
    {"candidates": ["The cat sleeps.", "The cat sleep."]}

The template is "{text} {candidate}" or, without text, "{candidate}", unless it says otherwise. A label, a candidate or
its number from 0, is needed only for accuracy, and in demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.text.rows import each_row, json_line_rows, text_file

CANDIDATE = "{candidate}"
TEXT = "{text}"
KEYS = ("text", "template", "candidates", "label")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Filled:
    """A prompt with one of its candidates, which stands at characters begin to end of it."""

    text: str
    begin: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """An item, with the demonstrations before it."""

    before: str
    """What stands before the candidate."""
    candidates: tuple[str, ...]
    after: str
    label: int | None
    """Number of the right candidate."""
    line: int = 0
    """In its file, from 1."""

    def filled(self, number: int) -> Filled:
        """With a candidate."""
        candidate = self.candidates[number]
        begin = len(self.before)
        return Filled(self.before + candidate + self.after, begin, begin + len(candidate))


def read_prompts(path: Path, demonstrations: Sequence[Prompt] = ()) -> list[Prompt]:
    """The items of a JSON Lines file, each after all demonstrations with their right candidates.

    Demonstrations stand in their order, with a space between. Raises UserError for a file without items, and with the
    lines that are none.
    """
    shown = "".join(f"{one.filled(one.label).text} " for one in demonstrations if one.label is not None)
    with text_file(path) as file:
        rows = list(json_line_rows(file, path))
    if not rows:
        raise UserError(f'{path}: holds no items; a line is {{"text": "It is", "candidates": ["good", "bad"]}}')
    prompts = each_row(path, rows, partial(_prompt, shown=shown))
    return [replace(one, line=row.number) for one, row in zip(prompts, rows, strict=True)]


def read_demonstrations(path: Path) -> list[Prompt]:
    """Items that all have labels. Raises UserError as `read_prompts` does, and for one without."""
    prompts = read_prompts(path)
    bare = [str(one.line) for one in prompts if one.label is None]
    if bare:
        raise UserError(f"{path}, line {', '.join(bare[:_SHOWN_PROBLEMS])}: a demonstration needs a label")
    return prompts


def _prompt(item: Mapping[str, Any], shown: str) -> Prompt:
    """Raises UserError."""
    for key in item:
        near = get_close_matches(key.strip().lower(), KEYS, n=1, cutoff=0.8)
        if near and key not in KEYS:
            raise UserError(f"has {key!r}; did you mean {near[0]}?")
    candidates: Any = item.get("candidates")
    is_list = isinstance(candidates, list) and all(isinstance(one, str) and one.strip() for one in candidates)
    if not is_list or len(candidates) < 2:
        raise UserError(f"candidates is {candidates!r}, must be two strings or more, none of them blank")
    if len(set(candidates)) < len(candidates):
        raise UserError(f"candidates is {candidates!r}, which names one twice")
    text = item.get("text", "")
    template = item.get("template", f"{TEXT} {CANDIDATE}" if text else CANDIDATE)
    if not isinstance(text, str) or not isinstance(template, str):
        raise UserError("text and template must be strings")
    if template.count(CANDIDATE) != 1:
        raise UserError(f"template {template!r} must have {CANDIDATE} once")
    if bool(text) != (TEXT in template):
        wrong = f"lacks {TEXT}, but there is a text" if text else f"has {TEXT}, but there is no text"
        raise UserError(f"template {template!r} {wrong}")
    before, after = (part.replace(TEXT, text) for part in template.split(CANDIDATE))
    return Prompt(shown + before, tuple(candidates), after, _label(item.get("label"), candidates))


def _label(label: object, candidates: Sequence[str]) -> int | None:
    if label is None:
        return None
    if label in candidates:
        return candidates.index(str(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(candidates):
        return label
    raise UserError(f"label is {label!r}, must be a candidate or its number, 0 to {len(candidates) - 1}")
