"""Scores of single items, held-out documents or examples of tasks, as JSON Lines: {"task", "id", "score"}."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.files import replace_text
from metro_megatron.text.rows import json_line_rows, text_file


@dataclass(frozen=True)
class Score:
    """What a model got for one item."""

    task: str
    """What was asked, which must be the same thing in all files that are compared."""
    id: str
    """Of the item, unique in its task and the same for every model."""
    score: float
    """In the task's own unit; the figure of a task is the mean over its items."""


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """A line for each; the file is the old one or the new one at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in scores))


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Scores by task and id. Raises UserError for a line that is none, and for a second score of an item."""
    found: dict[str, dict[str, float]] = {}
    with text_file(path) as file:
        rows = list(json_line_rows(file, path))
    for where, values in rows:
        one = _score(values)
        if one is None:
            raise UserError(
                f"{path}, {where}: {str(values)[:60]} is no score; "
                'a line is {"task": "cloze", "id": "17", "score": 1}'
            )
        items = found.setdefault(one.task, {})
        if one.id in items:
            raise UserError(f"{path}, {where}: {one.task} has a second score of {one.id}; give each item one")
        items[one.id] = one.score
    return found


def _score(values: Mapping[str, Any]) -> Score | None:
    """None unless it is a score, which is finite."""
    try:
        score = Score(str(values["task"]), str(values["id"]), float(values["score"]))
    except (ValueError, TypeError, KeyError):
        return None
    return score if math.isfinite(score.score) else None
