"""A step as a picture: traced ranks by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.timeline import BUBBLE, COMMUNICATING, WAITING, Span

COLORS = {
    "corrupt": ("#0f766e", "phase 1: the auxiliary"),
    "main": ("#c2410c", "phase 2: main"),
    "reduce": ("#c2410c", ""),
    "update": ("#697586", "optimizer"),
    COMMUNICATING: ("#c9d1da", "communicating, nothing beside it"),
    BUBBLE: ("#f3f5f7", "pipeline bubble"),
    WAITING: ("#fde68a", "waiting for parameters, gradients, others"),
}
"""By what a span is, with its label. What is empty has no label: it is rare and short."""


def draw(spans: Mapping[int, Sequence[Span]], ranks: Ranks, title: str, output: Path) -> None:
    """Write the picture, which `refuse_picture` has let pass; its kind is that of the name's ending."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 1.6 + 0.36 * len(spans)), layout="constrained")
    axes = figure.subplots()
    rows = sorted(spans, key=lambda rank: (ranks.places[rank].pipeline, rank))
    for row, rank in enumerate(rows):
        for what, (color, _) in COLORS.items():
            bars = [(1e3 * span.begin, 1e3 * (span.end - span.begin)) for span in spans[rank] if span.what == what]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, linewidth=0)
    axes.set_yticks(range(len(rows)), [_label(rank, ranks) for rank in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title)
    labels = [Patch(facecolor=color, label=label) for color, label in COLORS.values() if label]
    figure.legend(handles=labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(output, dpi=120)


def _label(rank: int, ranks: Ranks) -> str:
    place = ranks.places[rank]
    return f"rank {rank:,} (stage {place.pipeline}, tensor {place.tensor}, data {place.data})"
