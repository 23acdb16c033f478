"""The picture of the fused operators' benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.targets import LEAST_COPY_PERCENT

PHASES = ("forward", "backward")


def draw(rows: Sequence[Mapping[str, str]], output: Path) -> None:
    """Bars of percent of the ceiling: operators side by side, forward above backward, contestants by size."""
    from matplotlib.figure import Figure

    operators = list(dict.fromkeys(row["operator"] for row in rows))
    colors = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["contestant"] for row in rows))}
    figure = Figure(figsize=(5 * len(operators), 8), layout="constrained")
    axes = figure.subplots(len(PHASES), len(operators), squeeze=False)
    for column, operator in enumerate(operators):
        own = [row for row in rows if row["operator"] == operator]
        for line, phase in enumerate(PHASES):
            _bars(axes[line][column], own, f"{phase}_percent", colors)
            ceiling = "copy bandwidth" if own[0]["unit"] == "GB/s" else "bf16 matrix rate"
            axes[line][column].set_title(f"{operator} {phase}")
            axes[line][column].set_ylabel(f"% of {ceiling}")
            if own[0]["unit"] == "GB/s":
                axes[line][column].axhline(LEAST_COPY_PERCENT, color="gray", linestyle=":")
    figure.legend(*_legend(axes), loc="outside lower center", ncols=len(colors))
    first = rows[0]
    figure.suptitle(f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['date'][:10]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def _bars(axis, rows: Sequence[Mapping[str, str]], column: str, colors: Mapping[str, str]) -> None:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = [row for row in rows if row["contestant"] == name]
        places = [sizes.index(row["size"]) + (number - (len(names) - 1) / 2) * width for row in own]
        axis.bar(places, [float(row[column]) for row in own], width, label=name, color=colors[name])
    axis.set_xticks(range(len(sizes)), sizes, rotation=20, ha="right", fontsize="small")


def _legend(axes) -> tuple[list, list[str]]:
    """Handles and labels of all contestants, each once."""
    pairs = [pair for line in axes for axis in line for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    found = {label: handle for handle, label in pairs}
    return list(found.values()), list(found)
