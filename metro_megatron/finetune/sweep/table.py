"""The tables of a sweep: medians in the layout of METRO Table 6, published rows beside, and the spread over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from metro_megatron.finetune.sweep.outcome import Outcome
from metro_megatron.finetune.sweep.points import Point, Values, picked
from metro_megatron.finetune.sweep.published import (
    AVERAGES,
    GLUE_COLUMNS,
    GLUE_ROWS,
    SQUAD_COLUMN,
    SUPERGLUE_COLUMNS,
    SUPERGLUE_ROWS,
)

NOTHING = "–"
FAILED = "failed"


@dataclass(frozen=True)
class Layout:
    """A table of the paper."""

    scores: Mapping[str, tuple[str, ...]]
    """Of every task, by its name here, those of metrics.json that are shown: two as 90.3/90.2."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the paper calls the tasks."""
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Over which tasks; of a task with two scores their mean counts."""
    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Cells by row and column."""


_GLUE = ("mnli", "qqp", "qnli", "sst2", "cola", "rte", "mrpc", "stsb")
_SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc")
LAYOUTS = (
    Layout(
        {
            "mnli": ("accuracy", "accuracy_mm"),
            "cola": ("mcc",),
            "stsb": ("spearman",),
            **dict.fromkeys(("qqp", "qnli", "sst2", "rte", "mrpc"), ("accuracy",)),
            "squad2": ("exact", "f1"),
        },
        {**dict(zip(_GLUE, GLUE_COLUMNS, strict=True)), "squad2": SQUAD_COLUMN},
        dict(zip(AVERAGES, (_GLUE[:4], _GLUE), strict=True)),
        GLUE_ROWS,
    ),
    Layout(
        {
            "cb": ("macro_f1", "accuracy"),
            "multirc": ("f1a", "exact"),
            "record": ("f1", "exact"),
            **dict.fromkeys(("boolq", "copa", "superglue_rte", "wic", "wsc"), ("accuracy",)),
        },
        dict(zip(_SUPERGLUE, SUPERGLUE_COLUMNS, strict=True)),
        {"Average": _SUPERGLUE},
        SUPERGLUE_ROWS,
    ),
)


def markdown(points: Sequence[Point]) -> str:
    """All that there is to say of a sweep; the same for the same runs, whenever they were done."""
    best, tasks = picked(points), list(dict.fromkeys(point.task for point in points))
    known = [layout for layout in LAYOUTS if set(tasks) & layout.columns.keys()]
    of_papers = {task for layout in known for task in layout.columns}
    others = {task: _first_score(best, task) for task in tasks if task not in of_papers}
    parts = [_layout_table(best, layout) for layout in [*known, *([Layout(others)] if others else [])]]
    parts += ["Medians over seeds, in percent.", _spread_table(best)]
    failed = [one for point in points for one in point.outcomes if one.failure]
    if failed:
        parts.append("Failed runs, which stand below all others in the medians:\n\n" + _failures(failed))
    return "\n\n".join(parts) + "\n"


def points_csv(points: Sequence[Point]) -> str:
    """A line for every point and score of it."""
    best = picked(points)
    lines = [
        {
            **dict(point.row),
            "task": point.task,
            **dict(point.choice),
            "score": name,
            "median": point.median(name),
            "least": min(point.scores(name), default=None),
            "largest": max(point.scores(name), default=None),
            "seeds": len(point.outcomes),
            "failed": len(point.outcomes) - len(point.good),
            "picked": point in best,
        }
        for point in points
        for name in point.score_names
    ]
    return _csv(lines)


def runs_csv(outcomes: Iterable[Outcome]) -> str:
    """A line for every run: what it was given, its scores and why it counts as failed."""
    return _csv([{"run": one.run.name, **one.run.given, **one.scores, "failure": one.failure} for one in outcomes])


def label(values: Values) -> str:
    """A row's name: the model, and what else was chosen there."""
    words = [
        str(value) if name == "model" else name if value is True else f"{name} {value}"
        for name, value in values
        if value is not False and value not in ("", None)
    ]
    return ", ".join(words)


def _layout_table(best: Sequence[Point], layout: Layout) -> str:
    tasks = [task for task in layout.columns or layout.scores if any(point.task == task for point in best)]
    titles = [layout.columns.get(task, ", ".join([task, *layout.scores[task]])) for task in tasks]
    rows = []
    for row in dict.fromkeys(point.row for point in best):
        found = {
            point.task: _medians(point, layout.scores[point.task])
            for point in best
            if point.row == row and point.task in layout.scores
        }
        cells = [_cell(found[task]) if task in found else NOTHING for task in tasks]
        rows.append([label(row), *cells, *(_average(found, of) for of in layout.averages.values())])
    header = ["", *titles, *layout.averages]
    for name, printed in layout.published.items():
        cells = [printed.get(title, NOTHING) for title in header[1:]]
        if set(cells) != {NOTHING}:
            rows.append([f"*{name}*", *cells])
    return _table(header, rows)


def _medians(point: Point, names: Sequence[str]) -> tuple[float | None, ...]:
    return tuple(point.median(name) if name in point.score_names else None for name in names)


def _cell(medians: Sequence[float | None]) -> str:
    return "/".join(f"{100 * value:.1f}" for value in medians if value is not None) or FAILED


def _average(found: Mapping[str, Sequence[float | None]], tasks: Sequence[str]) -> str:
    numbers = []
    for task in tasks:
        medians = [value for value in found.get(task, ()) if value is not None]
        if not medians:
            return NOTHING
        numbers.append(fmean(medians))
    return f"{100 * fmean(numbers):.1f}"


def _spread_table(best: Sequence[Point]) -> str:
    rows = []
    for point in best:
        choice = ", ".join(f"{name} {value}" for name, value in point.choice) or NOTHING
        failed = len(point.outcomes) - len(point.good)
        shares = [one.majority_share for one in point.outcomes if one.majority_share is not None]
        floor = f"{100 * shares[0]:.1f}" if shares else NOTHING
        for name in point.score_names or [NOTHING]:
            scores, middle = (point.scores(name), point.median(name)) if point.score_names else ([], None)
            figures = [FAILED if middle is None else f"{100 * middle:.2f}"]
            figures += [f"{100 * of(scores):.2f}" if scores else NOTHING for of in (min, max)]
            rows.append(
                [label(point.row), point.task, choice, name, *figures, f"{len(point.outcomes)}", f"{failed}", floor]
            )
    header = ["", "task", "picked", "score", "median", "least", "largest", "seeds", "failed", "majority"]
    return _table(header, rows)


def _failures(failed: Iterable[Outcome]) -> str:
    lines = []
    for one in failed:
        options = " ".join(one.run.argv)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in one.scores.items())
        lines.append(f"- {one.run.name}: {one.failure}{f' ({scores})' if scores else ''}; {options}")
    return "\n".join(lines)


def _first_score(points: Iterable[Point], task: str) -> tuple[str, ...]:
    return next((tuple(point.score_names[:1]) for point in points if point.task == task and point.score_names), ())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _csv(lines: Sequence[Mapping[str, object]]) -> str:
    columns = dict.fromkeys(name for line in lines for name in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
