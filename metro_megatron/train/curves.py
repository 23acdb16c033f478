"""A run's figures over its steps, from metrics.jsonl, as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.objective.figures import panels
from metro_megatron.objective.term import Panel
from metro_megatron.objective.terms import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from metro_megatron.train.reference import Band

VALIDATION = "validation/"
PROBE = "probe/"
COLUMNS = 3
PLACES = ("step", "consumed_samples", "consumed_tokens")
"""Where in the run a line is."""
WINDOW = 10**0.1
"""Where places are tokens, a curve is averaged over a tenth of a decade, wherever it ends and however it is logged."""
DASHES = ("--", ":", "-.")
"""Of references, which differ in nothing else."""


@dataclass(frozen=True)
class Run:
    """The lines of one metrics.jsonl, each kind in order, and the run's configuration."""

    name: str
    training: list[dict[str, float]]
    validation: list[dict[str, float]]
    config: Config | None = None
    """None where the folder has no run_config.yaml."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises UserError if it has no metrics.jsonl, no line of training in it, or an unreadable configuration.
        """
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a run folder (train.output of pretrain_metro.py)")
        training: list[dict[str, float]] = []
        validation: list[dict[str, float]] = []
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                # null is what was not measured.
                figures = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
                is_validation = any(name.startswith(VALIDATION) for name in figures)
                figures["step"] = int(figures["step"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number == len(lines):  # cut short while the run goes on
                    break
                raise UserError(f"{path}, line {number}: not a line of metrics ({error})") from error
            if any(name.startswith(PROBE) for name in figures):
                continue
            (validation if is_validation else training).append(
                {name.removeprefix(VALIDATION): value for name, value in figures.items()}
            )
        if not training:
            raise UserError(f"{path}: holds no logged step yet")
        plan = folder / "run_config.yaml"
        return cls(folder.name, training, validation, load_config(plan) if plan.is_file() else None)

    @cached_property
    def even_lines(self) -> list[dict[str, float]]:
        """Those of training, joined until each covers half as many steps as they usually do: where a run ends, there
        may be a line whose figures are those of a few samples. A figure is the mean over the steps of the lines that
        have it, the place is that of the last one.
        """
        steps = covered_steps([line["step"] for line in self.training])
        least = float(np.median(steps)) / 2
        joined: list[list[tuple[float, dict[str, float]]]] = [[]]
        for one in zip(steps.tolist(), self.training, strict=True):
            if _steps(joined[-1]) >= least:
                joined.append([])
            joined[-1].append(one)
        if len(joined) > 1 and _steps(joined[-1]) < least:
            joined[-2:] = [joined[-2] + joined[-1]]
        return [_mean(lines) for lines in joined]

    def tokens_at(self, steps: Sequence[float]) -> list[float]:
        """Tokens read up to each step, between log lines by their mean."""
        known = [0.0, *(line["step"] for line in self.training)]
        return np.interp(steps, known, [0.0, *self.tokens(self.training)]).tolist()

    def tokens(self, lines: Sequence[dict[str, float]]) -> list[float]:
        """Tokens read at each line's end. Raises UserError where a line does not say."""
        if not all(_is_figure(line.get("consumed_tokens")) for line in lines):
            raise UserError(f"{self.name}: a line of metrics.jsonl has no consumed_tokens, which places it")
        return [line["consumed_tokens"] for line in lines]

    def tokens_per_second(self) -> float:
        """Tokens over the seconds spent on steps, evaluation and saving left out."""
        seconds = tokens = before = 0.0
        for line in self.training:
            seconds += (line["consumed_tokens"] - before) / line["tokens_per_second"]
            tokens, before = line["consumed_tokens"], line["consumed_tokens"]
        return tokens / seconds


def covered_steps(ends: ArrayLike) -> NDArray[np.float64]:
    """[n] how many steps or tokens each line is of, by those at its end; a run that began elsewhere did not log all."""
    steps = np.diff(ends, prepend=0.0)
    return np.append(min(steps[0], np.median(steps)), steps[1:])


def _steps(lines: Sequence[tuple[float, object]]) -> float:
    return sum(steps for steps, _ in lines)


def _mean(lines: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Of lines with the steps that each covers; text, which they have beside figures, stays that of the last."""
    last = lines[-1][1]
    means = {}
    for name in {name for _, line in lines for name in line} - set(PLACES):
        found = [(steps, line[name]) for steps, line in lines if _is_figure(line.get(name))]
        if found:
            means[name] = sum(steps * value for steps, value in found) / _steps(found)
    return last | means


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def shown_figures(runs: Sequence[Run]) -> set[str]:
    """What `draw` has a curve of."""
    logged = {name for run in runs for line in run.training for name in line}
    return logged & {name for panel in panels(ALL) for name in panel.curves}


def draw(runs: Sequence[Run], output: Path, references: Sequence[Band] = ()) -> None:
    """Draw every panel with all runs and write the picture; its kind is that of the name's ending.

    Runs whose configuration is known get one panel more, of what they schedule. With references, which are drawn below
    the runs, dashed, places are tokens on a logarithmic scale, and both are averaged over_tokens: batches, lengths and
    log intervals of runs may differ.
    """
    from matplotlib.figure import Figure

    figures = shown_figures(runs)
    shown = [panel for panel in panels(ALL) if figures & panel.curves.keys()]
    planned = [run for run in runs if run.config]
    count = len(shown) + bool(planned)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(13, 3.5 * rows), layout="constrained")
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(all_axes, shown, strict=False):
        _draw_panel(axes, panel, runs, references)
    for axes in all_axes[count:]:
        axes.remove()
    if planned:
        _draw_schedules(all_axes[len(shown)], planned)
    title = ", ".join(run.name for run in runs)
    figure.suptitle(f"{title}: training (lines, averaged) and validation (points)")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=120)
    except ValueError as error:
        raise UserError(f"--output {output}: {error}; name a .png, .svg or .pdf file") from error


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run], references: Sequence[Band]) -> None:
    color = 0
    colors: dict[str, str] = {}
    for run in runs:
        logged = {name for line in run.training for name in line}
        for name, label in panel.curves.items():
            if name not in logged:
                continue
            label = label if len(runs) == 1 else f"{run.name}: {label}"
            style: dict[str, Any] = {"color": f"C{color}"}
            colors.setdefault(name, f"C{color}")
            lines: tuple[ArrayLike, ArrayLike]
            means: tuple[ArrayLike, ArrayLike]
            if references:
                every = run.tokens(run.even_lines), [line.get(name, math.nan) for line in run.even_lines]
                lines, means = over_tokens(*every, window=1.0), over_tokens(*every)
            else:
                steps, values = _points(run.even_lines, name)
                lines, means = (steps, values), (steps, smooth(values, smoothing(len(values))))
            axes.plot(*lines, **style, alpha=0.25, linewidth=1)
            axes.plot(*means, **style, linewidth=1.8, label=label)
            steps, values = _points(run.validation, name)
            places = run.tokens_at(steps) if references else steps
            axes.plot(places, values, **style, marker="o", markersize=4, linestyle="none")
            color += 1
    for band, dashes in zip(references, cycle(DASHES), strict=False):
        for name, drawn in colors.items():
            _draw_band(axes, band, name, panel.curves[name], drawn, dashes)
    axes.set_title(panel.title)
    axes.set_xlabel("tokens" if references else "step")
    if references:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if panel.is_share:
        axes.set_ylim(0, 1)
    if color > 1 or references:
        axes.legend(fontsize="small")


def _draw_band(axes: Axes, band: Band, name: str, label: str, color: str, dashes: str) -> None:
    """A figure of a reference, in the color of the first run that has it, and below all runs."""
    curve = band.curve(name)
    if curve is None:
        return
    tokens, (least, median, largest) = curve
    style: dict[str, Any] = {"color": color, "zorder": 1}
    if len(band.runs) > 1:
        axes.fill_between(tokens, least, largest, **style, alpha=0.15, linewidth=0)
    axes.plot(tokens, median, **style, alpha=0.6, linewidth=1.2, linestyle=dashes, label=f"{band.label}: {label}")


def _draw_schedules(axes: Axes, runs: Sequence[Run]) -> None:
    """What changes by plan, over the whole of each run, as shares of its largest value."""
    for run in runs:
        assert run.config
        total = run.config.train.train_steps
        steps = sorted({*range(0, total, math.ceil(total / 500)), total - 1})
        for name, schedule in run.config.schedules.items():
            values = [schedule.at(step, total) for step in steps]
            largest = max(map(abs, values)) or 1.0
            label = f"{name}, 1 is {largest:g}" if len(runs) == 1 else f"{run.name}: {name}, 1 is {largest:g}"
            # The step that is logged as n is the 0-based step n - 1.
            axes.plot([step + 1 for step in steps], [value / largest for value in values], label=label)
    axes.set_title("schedules")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over up to `width` values on either side of each one, as many on both: a slope stays where it is."""
    means = []
    for index in range(len(values)):
        sides = min(width, index, len(values) - 1 - index)
        window = values[index - sides : index + sides + 1]
        means.append(sum(window) / len(window))
    return means


def smoothing(count: int) -> int:
    """`width` for the curve of a run of so many log lines."""
    return max(1, count // 40)


def over_tokens(
    ends: ArrayLike, values: ArrayLike, window: float = WINDOW
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places and means [n] of a figure that each line measured since the line before; nan, and left out, where none.

    A mean is over whole lines, from that of a line's end divided by `window` on. It stands at the mean of log(tokens)
    over these lines: what is straight on a logarithmic axis stays where it is, however wide lines and windows are.
    """
    figure, end = np.asarray(values, dtype=float), np.asarray(ends, dtype=float)
    begin = end - covered_steps(end)
    is_there = np.isfinite(figure) & (end > begin)
    begin, end, figure = begin[is_there], end[is_there], figure[is_there]
    own = np.arange(len(end))
    first = np.clip(np.searchsorted(begin, end / window, side="right") - 1, 0, own)
    covered = end - begin
    tokens, logs, sums = (
        (total := np.append(0.0, np.cumsum(part)))[own + 1] - total[first]
        for part in (covered, _log_integral(end) - _log_integral(begin), figure * covered)
    )
    return np.exp(logs / tokens), sums / tokens


def _log_integral(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of log(x) from 0 on."""
    return tokens * (np.log(np.maximum(tokens, 1.0)) - 1)


def _points(lines: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    present = [line for line in lines if name in line]
    return [line["step"] for line in present], [line[name] for line in present]
