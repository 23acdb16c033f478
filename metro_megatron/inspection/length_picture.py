"""Lengths and padding of a dataset's sources as a picture, with matplotlib, which few need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metro_megatron.data.manifest import LengthHistogram
from metro_megatron.inspection.documents import SEQ_LENGTHS, SourceLengths, by_powers


def draw(sources: Sequence[SourceLengths], output: Path) -> None:
    """Draw histograms of documents and units, and padding, by source, into a file that `refuse_picture` lets pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    documents, units, padding = figure.subplots(1, 3)
    _draw_lengths(documents, "documents", [(one.name, one.statistics.document_lengths) for one in sources])
    _draw_lengths(units, "units", [(one.name, one.statistics.unit_lengths) for one in sources])
    _draw_padding(padding, sources)
    figure.savefig(output, dpi=120)


def _draw_lengths(axes: Any, title: str, histograms: list[tuple[str, LengthHistogram]]) -> None:
    for name, histogram in histograms:
        counts = by_powers(histogram)
        axes.stairs(counts / max(1, counts.sum()), 2.0 ** np.arange(len(counts) + 1), label=name, linewidth=1.8)
    longest = max((np.flatnonzero(by_powers(one)).max(initial=0) for _, one in histograms), default=0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, 2.0 ** (longest + 1))
    axes.set_title(f"{title} by length")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"share of {title}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _draw_padding(axes: Any, sources: Sequence[SourceLengths]) -> None:
    filled = [source for source in sources if source.samples]
    height = 0.8 / (2 * len(SEQ_LENGTHS))
    tops = np.arange(len(filled))
    for number, seq_length in enumerate(SEQ_LENGTHS):
        padded = [100 * source.samples[number].padded_waste for source in filled]
        packed = [100 * source.samples[number].packed_waste for source in filled]
        for shift, values, kind in ((0, padded, "one sample a row"), (1, packed, "packed rows")):
            bars = axes.barh(
                tops + (2 * number + shift) * height, values, height, label=f"samples of {seq_length}, {kind}"
            )
            axes.bar_label(bars, fmt="%.2f%%", fontsize="small", padding=2)
    axes.set_yticks(tops + 1.5 * height, [source.name for source in filled])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_title("padding")
    axes.set_xlabel("% of all places")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2)
