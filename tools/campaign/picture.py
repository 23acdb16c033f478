"""The campaign's differences as a picture: for each arm a panel, for each task a point with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metro_megatron.commands.compare_runs import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOVE, BELOW, OPEN = "#0f766e", "#c2410c", "#8c97a4"
COLUMNS = 4


def draw(ours: str, panels: Mapping[str, Sequence[Compared]], output: Path) -> None:
    """Write the picture of our arm's scores minus another's, which `refuse_picture` has let pass.

    panels: what `compare` says, by what is compared with ours. A single seed's difference has no interval.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = list(dict.fromkeys(one.task for found in panels.values() for one in found))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.0 + 2.3 * columns, rows * (0.6 + 0.24 * len(tasks)) + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (title, found) in zip(grid, panels.items(), strict=False):
        _panel(axes, found, tasks)
        axes.set_title(title, fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    grid[0].set_yticks(range(len(tasks)), tasks)
    grid[0].invert_yaxis()
    labels = [
        Line2D([], [], color=color, marker="o", linewidth=2, label=label)
        for color, label in ((ABOVE, f"{ours} is higher"), (BELOW, "the other is higher"), (OPEN, "no verdict"))
    ]
    figure.supxlabel(f"{ours}'s score minus the other's, with its 95% interval", fontsize="medium")
    figure.legend(handles=labels, loc="outside upper center", ncols=len(labels), fontsize="small", frameon=False)
    figure.savefig(output, dpi=120)


def _panel(axes: Axes, found: Sequence[Compared], tasks: Sequence[str]) -> None:
    axes.axvline(0, color="#1f2933", linewidth=0.8)
    for one in found:
        row = tasks.index(one.task)
        if isinstance(one.found, float):
            axes.plot([one.found], [row], "o", color=OPEN, markersize=4.5)
            continue
        color = (ABOVE if one.found.mean > 0 else BELOW) if one.found.is_verdict else OPEN
        axes.errorbar(one.found.mean, row, xerr=one.found.half_width, fmt="o", color=color, markersize=4.5, linewidth=2)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize="small")
