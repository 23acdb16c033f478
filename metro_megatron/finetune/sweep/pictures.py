"""Pictures of a sweep: scores over seeds as boxes (METRO Figure 4), and over pretraining FLOPs (Figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metro_megatron.finetune.sweep.points import Point, Values, picked
from metro_megatron.finetune.sweep.table import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3


def box_plots(points: Sequence[Point]) -> Figure:
    """A panel for every task, a box for every row at its picked point, a dot for every seed that has not failed."""
    best = picked(points)

    def draw(axes: Axes, found: Sequence[Point], score: str) -> None:
        scores = [[100 * value for value in point.scores(score)] for point in found]
        failed = [len(point.outcomes) - len(point.good) for point in found]
        names = [
            label(point.row).replace(", ", "\n") + (f"\n{number} failed" if number else "")
            for point, number in zip(found, failed, strict=True)
        ]
        axes.boxplot(scores, tick_labels=names, showfliers=False, medianprops={"color": "C1"})
        for place, values in enumerate(scores, start=1):
            axes.plot([place] * len(values), values, "o", color="C0", alpha=0.5, markersize=4)
        axes.tick_params(axis="x", labelsize="x-small")

    return _panels(best, draw)


def flops_curves(points: Sequence[Point], flops: Callable[[Values], float | None]) -> Figure | None:
    """A panel for every task: medians of picked points over what their models' pretraining has cost.

    `flops` says it for a row, None where it is not known. A line joins the models whose folders lie in one folder: the
    checkpoints of a run. None where no two rows have FLOPs.
    """
    known = {row: cost for row in dict.fromkeys(point.row for point in points) if (cost := flops(row)) is not None}
    if len(set(known.values())) < 2:
        return None

    def draw(axes: Axes, found: Sequence[Point], score: str) -> None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in found:
            value = point.median(score)
            if value is not None:
                lines.setdefault(_line(point.row), []).append((known[point.row], 100 * value))
        for name, places in lines.items():
            costs, values = zip(*sorted(places), strict=True)
            axes.plot(costs, values, marker="o", label=name)
        axes.set_xlabel("pretraining FLOPs")
        axes.legend(fontsize="x-small")

    return _panels([point for point in picked(points) if point.row in known], draw)


def _line(row: Values) -> str:
    """A row's name, with the folder of the model's folder in its place."""
    return label(tuple((name, str(Path(value).parent) if name == "model" else value) for name, value in row))


def _panels(points: Sequence[Point], draw: Callable[[Axes, Sequence[Point], str], None]) -> Figure:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(point.task for point in points))
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(panels, tasks, strict=False):
        found = [point for point in points if point.task == task]
        score = next((point.score_names[0] for point in found if point.score_names), "")
        if score:
            draw(axes, [point for point in found if point.score_names], score)
        axes.set(title=task, ylabel=score)
        axes.grid(alpha=0.3)
    for axes in panels[len(tasks) :]:
        axes.remove()
    return figure
