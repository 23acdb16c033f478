"""A run's figures over its steps, from metrics.jsonl, as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.objective.figures import panels
from metro_megatron.objective.term import Panel
from metro_megatron.objective.terms import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALIDATION = "validation/"
PROBE = "probe/"
COLUMNS = 3


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
                figures: dict[str, float] = json.loads(line)
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

    def tokens_per_second(self) -> float:
        """Tokens over the seconds spent on steps, evaluation and saving left out."""
        seconds = tokens = before = 0.0
        for line in self.training:
            seconds += (line["consumed_tokens"] - before) / line["tokens_per_second"]
            tokens, before = line["consumed_tokens"], line["consumed_tokens"]
        return tokens / seconds


def draw(runs: Sequence[Run], output: Path) -> None:
    """Draw every panel with all runs and write the picture; its kind is that of the name's ending.

    Runs whose configuration is known get one panel more, of what they schedule.
    """
    from matplotlib.figure import Figure

    logged = {name for run in runs for line in run.training for name in line}
    shown = [panel for panel in panels(ALL) if logged & panel.curves.keys()]
    planned = [run for run in runs if run.config]
    count = len(shown) + bool(planned)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(13, 3.5 * rows), layout="constrained")
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(all_axes, shown, strict=False):
        _draw_panel(axes, panel, runs)
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


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    color = 0
    for run in runs:
        logged = {name for line in run.training for name in line}
        for name, label in panel.curves.items():
            if name not in logged:
                continue
            label = label if len(runs) == 1 else f"{run.name}: {label}"
            style: dict[str, Any] = {"color": f"C{color}"}
            steps, values = _points(run.training, name)
            axes.plot(steps, values, **style, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(values, max(1, len(values) // 40)), **style, linewidth=1.8, label=label)
            axes.plot(*_points(run.validation, name), **style, marker="o", markersize=4, linestyle="none")
            color += 1
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if panel.is_share:
        axes.set_ylim(0, 1)
    if color > 1:
        axes.legend(fontsize="small")


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
    """Mean over up to `width` values on either side of each one."""
    means = []
    for index in range(len(values)):
        window = values[max(0, index - width) : index + width + 1]
        means.append(sum(window) / len(window))
    return means


def _points(lines: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    present = [line for line in lines if name in line]
    return [line["step"] for line in present], [line[name] for line in present]
