"""METRO Figure 3 of four runs: replace rate and replace accuracy over the steps, as a picture and as numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metro_megatron.cli.command_line import run_tool
from metro_megatron.train.curves import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGENDS = {
    "lr_1e-4_clip_2": "LR 1e-4 + GNormClip 2.0",
    "lr_2e-5_clip_2": "LR 2e-5 + GNormClip 2.0",
    "lr_1e-4_clip_1": "LR 1e-4 + GNormClip 1.0",
    "lr_1e-4_clip_1_scaled_init": "LR 1e-4 + GNormClip 1.0 + Scaled_Init",
}
"""Run folders, and what the paper calls them."""
PANELS = {
    "replace_rate": ("(a) Auxiliary model", "replace rate"),
    "replace_accuracy": ("(b) Main model", "replace accuracy"),
}
SMOOTH_STEPS = 2
"""Lines of the log averaged on either side."""


@dataclass(frozen=True)
class Options:
    """Of what."""

    root: str
    """Folder of the runs; figure3.png and figure3.json are written there."""


def main(options: Options) -> None:
    """Draw replace rate and replace accuracy of Figure 3's arms, and write what is drawn as JSON."""
    root = Path(options.root)
    curves = collect(root)
    (root / "figure3.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    draw(curves).savefig(root / "figure3.png", dpi=110)
    for arm, points in curves.items():
        print(f"  {LEGENDS[arm]:<38} replace rate {points['replace_rate'][-1]:.3f}, ", end="")
        print(f"replace accuracy {points['replace_accuracy'][-1]:.3f} at step {points['step'][-1]:,}")
    print(f"made {root}/figure3.png and {root}/figure3.json")


def collect(root: Path) -> dict[str, dict[str, list[float]]]:
    """Of every arm the logged steps, and at each the two figures, averaged over neighbours."""
    runs = {arm: Run.read(root / arm).training for arm in LEGENDS}
    return {
        arm: {
            "step": [line["step"] for line in lines],
            **{name: [round(y, 4) for y in averaged([line[name] for line in lines])] for name in PANELS},
        }
        for arm, lines in runs.items()
    }


def averaged(values: Sequence[float]) -> list[float]:
    """Means over SMOOTH_STEPS lines on either side, as far as there are some: the last figure is a mean, too."""
    windows = (values[max(0, index - SMOOTH_STEPS) : index + SMOOTH_STEPS + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """As in the paper: the auxiliary on the left, main on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, (title, label)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for arm, points in curves.items():
            axes.plot(points["step"], points[name], label=LEGENDS[arm], linewidth=1.6)
        axes.set(title=title, xlabel="step", ylabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    run_tool(main)
