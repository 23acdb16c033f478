"""Draw the two pictures of README.md: one step of pretraining, and the curves of a demo.

    python docs/pictures/draw.py                       # step.png, and demo.png from demo_metrics.jsonl
    python docs/pictures/draw.py --run runs/demo/pretraining --word_frequencies 6.769 --commit HASH --device "..."

The second line first takes the figures of another run into demo_metrics.jsonl. Needs matplotlib (the extra `demo`).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rcdefaults
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

FOLDER = Path(__file__).parent
METRICS = FOLDER / "demo_metrics.jsonl"
DRAWN = ("aux_loss", "clm_loss")
"""Figures kept of every line of metrics.jsonl."""

INK, QUIET, LINE, PAPER = "#1f2933", "#697586", "#c9d1da", "#ffffff"
SHARED, SHARED_LIGHT, SHARED_PALE = "#0f766e", "#99d5cd", "#e6f4f1"
STAGE, STAGE_LIGHT, STAGE_PALE = "#c2410c", "#fdc9a3", "#fdf0e6"
GREY_PALE = "#f3f5f7"

RANKS, MICRO_BATCHES = 2, 4
SENTENCE = ("the", "film", "was", "funny", "but", "too", "long")
SAMPLES = {3: "sad", 6: "long"}
"""Masked positions of SENTENCE, and what the auxiliary model draws for them: another word, and by luck the same."""


@dataclass(frozen=True)
class Work:
    """One cell of the timetable: the forward (1 unit) or backward (2 units) pass of a micro batch."""

    micro_batch: int
    is_forward: bool
    begin: float

    @property
    def width(self) -> float:
        return 1.0 if self.is_forward else 2.0

    @property
    def end(self) -> float:
        return self.begin + self.width


def auxiliary_timetable(rank: int) -> list[Work]:
    """Phase 1: micro batches p, p + P, ... of pipeline rank p, each forward and backward at once."""
    cells: list[Work] = []
    for turn, micro_batch in enumerate(range(rank, MICRO_BATCHES, RANKS)):
        cells += [Work(micro_batch, True, 3.0 * turn), Work(micro_batch, False, 3.0 * turn + 1)]
    return cells


def main_timetable() -> list[list[Work]]:
    """Phase 2: one forward, one backward in turn on every stage, each begun as early as what it waits for allows."""
    orders: list[list[tuple[int, bool]]] = []
    for stage in range(RANKS):
        warm_up = min(RANKS - stage - 1, MICRO_BATCHES)
        order = [(one, True) for one in range(warm_up)]
        for one in range(MICRO_BATCHES - warm_up):
            order += [(warm_up + one, True), (one, False)]
        orders.append(order + [(one, False) for one in range(MICRO_BATCHES - warm_up, MICRO_BATCHES)])
    done: dict[tuple[int, int, bool], float] = {}
    cells: list[list[Work]] = [[] for _ in range(RANKS)]
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            micro_batch, is_forward = order[0]
            neighbour = stage - 1 if is_forward else stage + 1
            is_at_end = neighbour in (-1, RANKS)
            waits_for = (stage, micro_batch, True) if is_at_end else (neighbour, micro_batch, is_forward)
            if not (is_at_end and is_forward) and waits_for not in done:
                continue
            before = cells[stage][-1].end if cells[stage] else 0.0
            work = Work(micro_batch, is_forward, max(before, done.get(waits_for, 0.0)))
            cells[stage].append(work)
            done[stage, micro_batch, is_forward] = work.end
            order.pop(0)
    return cells


# The step's picture is WIDTH units wide; y grows upwards.
WIDTH, HEIGHT = 100.0, 51.0
INCHES = 11.2
POINT = WIDTH / (72 * INCHES)
PHASE_1, EXCHANGE, PHASE_2, UPDATE = (17.3, 40.3), (41.1, 48.3), (49.1, 87.1), (87.9, 99.6)
"""Left and right edges of the columns."""
RANK_ROWS, ROW_HEIGHT = (17.9, 9.5), 7.4
"""Lower edges of the timetables of rank 0 and rank 1, and their height."""
HEADING = 27.0
"""Height of the headings above the timetables."""
LEGEND, NETWORK = 7.3, 4.5
"""Heights of the line under the timetables, and of the bars of communication."""
MARGIN = 0.9


def draw_step() -> Figure:
    """One optimizer step of a pipeline group of RANKS ranks."""
    figure = Figure(figsize=(INCHES, INCHES * HEIGHT / WIDTH), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    _draw_columns(axes)
    _draw_auxiliary_words(axes)
    _draw_main_words(axes)
    _draw_homes(axes)
    _draw_timetables(axes)
    _draw_communication(axes)
    return figure


def _draw_columns(axes: Axes) -> None:
    columns = (
        (PHASE_1, "Phase 1", "the auxiliary model fills the masks", SHARED, SHARED_PALE),
        (EXCHANGE, "Exchange", "", QUIET, GREY_PALE),
        (PHASE_2, "Phase 2", "the main model finds and corrects what was replaced", STAGE, STAGE_PALE),
        (UPDATE, "Update", "", QUIET, GREY_PALE),
    )
    for (left, right), title, text, color, pale in columns:
        _box(axes, left, 0.6, right - left, HEIGHT - 1.2, pale, "none")
        middle = (left + right) / 2
        _write(axes, middle, HEIGHT - 2.8, title, size=12.5 if text else 10, color=color, weight="bold")
        _write(axes, middle, HEIGHT - 5.3, text, size=8.8, color=color)
    _write(axes, sum(UPDATE) / 2, HEIGHT - 12.5, "loss =\nMLM\n+ 50 RTD\n+ CLM", size=9.5)
    _write(axes, sum(EXCHANGE) / 2, HEIGHT - 11.0, "only ids\ncross:\nno gradient", size=8)
    _arrow(axes, (EXCHANGE[0] + 0.8, HEIGHT - 14.6), (EXCHANGE[1] - 0.8, HEIGHT - 14.6), INK, width=2.0)


TOKENS, ENCODERS, ANSWERS, CORRECTIONS = HEIGHT - 9.0, HEIGHT - 13.2, HEIGHT - 17.3, HEIGHT - 20.7
"""Heights of what is drawn of SENTENCE, from top to bottom."""


def _draw_auxiliary_words(axes: Axes) -> None:
    _write(axes, 0.8, ENCODERS, "what happens\nto a sentence", size=9.5, color=QUIET, align="left")
    step = 3.15
    first = sum(PHASE_1) / 2 - 3 * step
    for position, word in enumerate(SENTENCE):
        x = first + position * step
        if position not in SAMPLES:
            _token(axes, x, TOKENS, word, step - 0.25)
            continue
        _token(axes, x, TOKENS, "[ ? ]", step - 0.25, SHARED)
        _token(axes, x, ANSWERS, SAMPLES[position], step - 0.25, SHARED)
        _arrow(axes, (x, ENCODERS - 1.2), (x, ANSWERS + 1.1), SHARED)
    _model(axes, first + 3 * step, ENCODERS, 6.9 * step, "auxiliary encoder", SHARED)
    _write(axes, first - 1.4, ANSWERS, "a sample of what it\nthinks stood there", size=7.0, color=SHARED, align="left")
    text = "MLM: learns to name the original words"
    _write(axes, sum(PHASE_1) / 2, CORRECTIONS, text, size=7.6, color=SHARED)


def _draw_main_words(axes: Axes) -> None:
    step = 4.15
    first = PHASE_2[1] - MARGIN - 6.5 * step
    for position, word in enumerate(SENTENCE):
        x, shown = first + position * step, SAMPLES.get(position, word)
        is_masked, is_replaced = position in SAMPLES, shown != word
        _token(axes, x, TOKENS, shown, step - 0.35, SHARED if is_masked else None)
        answer = "replaced" if is_replaced else "original"
        _token(axes, x, ANSWERS, answer, step - 0.35, STAGE if is_replaced else None, size=6.2)
        if is_masked:
            _token(axes, x, CORRECTIONS, word, step - 0.35, STAGE)
        _arrow(axes, (x, ENCODERS - 1.2), (x, ANSWERS + 1.1), STAGE)
    _model(axes, first + 3 * step, ENCODERS, 6.9 * step, "main encoder", STAGE)
    _write(axes, PHASE_2[0] + MARGIN, ANSWERS, "RTD: was each\nword replaced?", size=7.4, color=STAGE, align="left")
    text = "CLM: which word stood at the masks?"
    _write(axes, PHASE_2[0] + MARGIN, CORRECTIONS, text, size=7.6, color=STAGE, align="left")


def _draw_homes(axes: Axes) -> None:
    """What every rank holds, which is the legend of the colours too."""
    _write(axes, 0.8, HEADING, "two homes of parameters", size=9.5, color=QUIET, align="left")
    half = ROW_HEIGHT / 2
    for rank, (row, layers) in enumerate(zip(RANK_ROWS, ("lower half", "upper half, heads"), strict=True)):
        _write(axes, 1.4, row + half, f"rank {rank}", size=9.5, weight="bold", turn=90)
        _box(axes, 2.8, row + half + 0.2, 13.6, half - 0.2, SHARED_LIGHT, SHARED)
        _write(axes, 9.6, row + 1.5 * half + 0.1, "token embedding,\nwhole auxiliary model", size=7.4)
        _box(axes, 2.8, row, 13.6, half - 0.2, STAGE_LIGHT, STAGE)
        _write(axes, 9.6, row + 0.5 * half - 0.1, f"main model:\n{layers}", size=7.4)
    for y, name, text, color in (
        (LEGEND - 0.4, "shared home", "on every rank", SHARED),
        (LEGEND - 2.6, "stage home", "one per stage", STAGE),
    ):
        _write(axes, 0.8, y, name, size=7.6, color=color, weight="bold", align="left")
        _write(axes, 16.4, y, text, size=7, color=color, align="right")


def _draw_timetables(axes: Axes) -> None:
    mains = main_timetable()
    phases = (
        (PHASE_1, [auxiliary_timetable(rank) for rank in range(RANKS)], (SHARED_LIGHT, SHARED)),
        (PHASE_2, mains, (STAGE_LIGHT, STAGE)),
    )
    for (left, right), tables, colors in phases:
        unit = (right - left - 2 * MARGIN) / max(cell.end for table in tables for cell in table)
        for row, table in zip(RANK_ROWS, tables, strict=True):
            _cells(axes, table, left + MARGIN, row, unit, colors)
    headings = (
        (PHASE_1, "a rank's share of the micro batches", SHARED),
        (PHASE_2, "all micro batches, filled in, through the stages of the pipeline", STAGE),
    )
    for (left, _), text, color in headings:
        _write(axes, left + MARGIN, HEADING, text, size=8.2, color=color, align="left")
    for left, text in ((PHASE_1[0], "numbers: micro batches"), (PHASE_2[0], "light: forward, dark: backward")):
        _write(axes, left + MARGIN, LEGEND, text, size=7.2, color=QUIET, align="left")


def _draw_communication(axes: Axes) -> None:
    """What crosses between ranks, and what hides behind the phases."""
    low, high = RANK_ROWS[1] + 1.0, RANK_ROWS[0] + ROW_HEIGHT - 1.0
    middle = sum(EXCHANGE) / 2
    _arrow(axes, (middle, low), (middle, high), INK, both=True, width=2.2)
    label = {"facecolor": GREY_PALE, "edgecolor": "none"}
    style: dict[str, Any] = {"ha": "center", "va": "center", "bbox": label}
    axes.text(middle, (low + high) / 2, "all ranks get\nall samples", fontsize=7.6, **style)

    left, right = UPDATE[0] + 2.6, UPDATE[1] - 3.6
    _write(axes, sum(UPDATE) / 2, HEADING, "gradients are summed", size=7)
    _arrow(axes, (left, low), (left, high), SHARED, both=True, width=2.2)
    for row in RANK_ROWS:
        for y, color in ((row + 5.2, SHARED), (row + 3.4, STAGE)):
            _arrow(axes, (right - 2.6, y), (right + 2.6, y), color, both=True, width=2.2)
        _write(axes, right, row + 1.5, "data-parallel\ncopies", size=6.6, color=QUIET)
    _write(axes, sum(UPDATE) / 2, LEGEND - 0.9, "one norm,\none clipping, Adam", size=7.6)

    for (begin, end), text, color in (
        (PHASE_1, "meanwhile: main's new weights arrive", STAGE),
        (PHASE_2, "meanwhile: the auxiliary's gradients are summed", SHARED),
        (UPDATE, "the rest is summed", INK),
    ):
        axes.add_patch(Rectangle((begin + MARGIN, NETWORK - 0.9), end - begin - 2 * MARGIN, 0.6, facecolor=color))
        _write(axes, begin + MARGIN, NETWORK - 2.3, text, size=7.2, color=color, align="left")


def _cells(axes: Axes, table: Sequence[Work], left: float, row: float, unit: float, colors: tuple[str, str]) -> None:
    """Light cells run forward, dark ones backward; each says its micro batch."""
    for cell in table:
        color = colors[0] if cell.is_forward else colors[1]
        x, width = left + cell.begin * unit, cell.width * unit
        axes.add_patch(Rectangle((x, row), width, ROW_HEIGHT, facecolor=color, edgecolor=PAPER, linewidth=1.6))
        ink = INK if cell.is_forward else PAPER
        _write(axes, x + width / 2, row + ROW_HEIGHT / 2, str(cell.micro_batch), size=11, color=ink, weight="bold")


def _token(
    axes: Axes, x: float, y: float, word: str, width: float, color: str | None = None, size: float = 8.2
) -> None:
    _box(axes, x - width / 2, y - 1.15, width, 2.3, color or PAPER, color or LINE, rounding=0.35)
    _write(axes, x, y, word, size=size, color=PAPER if color else INK, weight="bold" if color else "normal")


def _model(axes: Axes, x: float, y: float, width: float, name: str, color: str) -> None:
    _box(axes, x - width / 2, y - 1.2, width, 2.4, PAPER, color, rounding=0.5)
    _write(axes, x, y, name, size=9, color=color, weight="bold")


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str, rounding: float = 0.6
) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1))


def _arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], color: str, both: bool = False, width: float = 1.2
) -> None:
    style = "<|-|>" if both else "-|>"
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle=style, mutation_scale=9 + 2 * width, linewidth=width, color=color)
    )


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    color: str = INK,
    weight: str = "normal",
    align: str = "center",
    turn: float = 0.0,
) -> None:
    """Centered at the height y: a line by its capitals, so that words with and without tails stand on one line."""
    style: dict[str, Any] = {"ha": align, "va": "center", "linespacing": 1.25, "rotation": turn}
    if "\n" not in text and not turn:
        style["va"] = "baseline"
        y -= 0.36 * size * POINT
    axes.text(x, y, text, fontsize=size, color=color, fontweight=weight, **style)


def take_run(run: Path, facts: dict[str, Any]) -> None:
    """Write METRICS: a line of facts, then the drawn figures of every line of the run's metrics.jsonl."""
    lines = [json.dumps(facts)]
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        figures = json.loads(line)
        names = [f"{prefix}{name}" for prefix in ("", "validation/") for name in DRAWN]
        kept = {name: round(figures[name], 4) for name in names if name in figures}
        if "consumed_tokens" in figures:
            kept["consumed_tokens"] = figures["consumed_tokens"]
        lines.append(json.dumps({"step": figures["step"], **kept}))
    METRICS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def draw_demo() -> Figure:
    """Both models' losses at masked positions, against what word frequencies alone would reach."""
    facts, *lines = map(json.loads, METRICS.read_text(encoding="utf-8").splitlines())
    figure = Figure(figsize=(8.5, 3.6), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    for name, label, color in (
        ("clm_loss", "main model (CLM)", STAGE),
        ("aux_loss", "auxiliary model (MLM)", SHARED),
    ):
        axes.plot(*_points(lines, name), color=color, linewidth=1.8, label=label)
        axes.plot(*_points(lines, f"validation/{name}"), color=color, marker="o", linestyle="")
    level = facts["word_frequencies"]
    axes.axhline(level, color=QUIET, linestyle="--", linewidth=1.2, label="word frequencies alone")
    axes.set(xlabel="step", ylabel="loss at masked tokens (nats)", ylim=(None, level + 0.75), xlim=(0, None))
    axes.grid(color=LINE, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    last = next(line for line in reversed(lines) if "consumed_tokens" in line)
    run = f"{last['step']:,} steps, {last['consumed_tokens'] / 1e6:.2f}M tokens, {facts['device']}, {facts['commit']}"
    axes.set_title(f"{run}. Lines: training; points: held-out reviews.", fontsize=8.5, color=QUIET)
    return figure


def _points(lines: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    present = [line for line in lines if name in line]
    return [line["step"] for line in present], [line[name] for line in present]


def save(figure: Figure, name: str) -> None:
    """In a palette of 128 colours, which makes small files; the same bytes for the same release of matplotlib."""
    memory = BytesIO()
    figure.savefig(memory, dpi=160, format="png")
    Image.open(memory).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder whose figures replace demo_metrics.jsonl")
    parser.add_argument("--word_frequencies", type=float, help="unigram_loss of tools/evaluate.py")
    parser.add_argument("--commit", help="what the run was made with")
    parser.add_argument("--device", help="what it was made on")
    options = vars(parser.parse_args())
    run = options.pop("run")
    if run:
        if None in options.values():
            parser.error("--run needs --word_frequencies, --commit and --device")
        take_run(run, options)
    rcdefaults()  # not what the user's matplotlibrc says
    save(draw_step(), "step.png")
    save(draw_demo(), "demo.png")


if __name__ == "__main__":
    main()
