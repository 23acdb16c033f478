"""A picture of how long the documents of each source are, and what padding would waste on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metro_megatron.data.statistics import EDGES, LengthHistogram
from metro_megatron.data.waste import PACKED_ROW, Waste
from metro_megatron.errors import UserError


@dataclass(frozen=True)
class SourceFigures:
    """What is drawn of a source."""

    documents: LengthHistogram
    units: LengthHistogram
    waste: Waste


def draw(sources: Mapping[str, SourceFigures], output: Path) -> None:
    """Write the picture of sources by name; its kind is that of the file name's ending."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    documents, units, waste = figure.subplots(1, 3)
    _draw_lengths(documents, "documents", {name: one.documents for name, one in sources.items()})
    _draw_lengths(units, "units", {name: one.units for name, one in sources.items()})
    _draw_waste(waste, {name: one.waste for name, one in sources.items()})
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=120)
    except ValueError as error:
        raise UserError(f"--picture {output}: {error}; name a .png, .svg or .pdf file") from error


def _draw_lengths(axes: Axes, what: str, histograms: Mapping[str, LengthHistogram]) -> None:
    last = 1
    for name, histogram in histograms.items():
        last = max(last, int(np.flatnonzero(histogram.counts).max(initial=0)) + 1)
        axes.stairs(histogram.counts[:-1] / max(1, histogram.total), EDGES, label=name, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, EDGES[min(last, len(EDGES) - 1)])
    axes.set_title(f"lengths of {what}")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"share of {what}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_waste(axes: Axes, wastes: Mapping[str, Waste]) -> None:
    names = list(wastes)
    bars = {f"padded, {length}": [wastes[name].padded[length] for name in names] for length in wastes[names[0]].padded}
    for length in wastes[names[0]].packed:
        bars[f"packed in {PACKED_ROW}, {length}"] = [wastes[name].packed[length] for name in names]
    width = 0.8 / len(bars)
    for number, (label, heights) in enumerate(bars.items()):
        places = np.arange(len(names)) + (number - (len(bars) - 1) / 2) * width
        axes.bar_label(
            axes.bar(places, heights, width, label=label), [f"{height:.2%}" for height in heights], fontsize=7
        )
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_title("share of a step that is padding")
    axes.legend(fontsize="small", title="rows, longest sample")
    axes.grid(alpha=0.3, axis="y")
