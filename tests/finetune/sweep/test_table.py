"""Tables and pictures against figures by hand and what is printed in the paper."""

from statistics import fmean
from typing import cast

import pytest

from metro_megatron.finetune.sweep.outcome import Outcome
from metro_megatron.finetune.sweep.pictures import box_plots, flops_curves
from metro_megatron.finetune.sweep.plan import Run
from metro_megatron.finetune.sweep.points import Point, points
from metro_megatron.finetune.sweep.published import GLUE_COLUMNS, GLUE_ROWS, SUPERGLUE_ROWS
from metro_megatron.finetune.sweep.table import LAYOUTS, markdown
from metro_megatron.finetune.tasks import BenchmarkName, benchmark
from tools.ledger.paper import read_paper


def outcome(task: str, seed: int, model: str = "m", failure: str = "", **scores: float) -> Outcome:
    values = {"task": task, "seed": seed, "model": model}
    return Outcome(Run(values, values, f"{task}{seed}{model}"), scores, failure)


def three_seeds(task: str, *names: str, base: float, model: str = "m") -> list[Outcome]:
    """Medians are `base`, base + 0.01 and so on by score."""
    return [
        outcome(task, seed, model, **{name: base + 0.01 * i + (seed - 2) / 10 for i, name in enumerate(names)})
        for seed in (1, 2, 3)
    ]


def of_points(outcomes: list[Outcome]) -> list[Point]:
    return points(outcomes, ["seed", "model"], ["model"])


SCORES = {
    "mnli": ("accuracy", "accuracy_mm"),
    "qqp": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "sst2": ("accuracy",),
    "cola": ("mcc", "accuracy"),
    "rte": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("spearman", "pearson"),
}


def test_the_layout_of_table_6_with_its_averages_and_published_rows() -> None:
    bases = {task: 0.5 + i / 50 for i, task in enumerate(SCORES)}
    found = [one for task, names in SCORES.items() for one in three_seeds(task, *names, base=bases[task])]
    lines = markdown(of_points(found)).splitlines()
    assert lines[0] == f"|  | {' | '.join(GLUE_COLUMNS)} | AVG Large | AVG All |"
    cells = lines[2].split(" | ")[1:]
    assert cells[:4] == ["50.0/51.0", "52.0", "54.0", "56.0"] and cells[7] == "64.0"
    large = [0.505, bases["qqp"], bases["qnli"], bases["sst2"]]
    everything = [*large, *(bases[task] for task in ("cola", "rte", "mrpc", "stsb"))]
    assert cells[8:] == [f"{100 * fmean(large):.1f}", f"{100 * fmean(everything):.1f} |"]
    assert (
        "| *METRO-LM base++, Table 6* | 90.3/90.2 | 92.4 | 94.4 | 95.9 | 71.8 | 88.1 | 91.4 | 92.0 | – | 89.5 |"
        in lines
    )
    # One task less: no average over all.
    (first,) = [line for line in markdown(of_points(found[:-3])).splitlines() if line.startswith("| m | ")][:1]
    assert first.endswith(f" | {100 * fmean(large):.1f} | – |")


def test_the_layouts_show_scores_that_the_tasks_have() -> None:
    for layout in LAYOUTS:
        for task, names in layout.scores.items():
            mine = benchmark(cast(BenchmarkName, task))
            others = {f"{score}_{name}" for name in mine.others for score in mine.scores}
            assert set(names) <= {*mine.scores, *others}, task
        assert layout.scores.keys() == layout.columns.keys() >= {task for of in layout.averages.values() for task in of}


def test_published_rows_are_the_ledger_s() -> None:
    paper = read_paper()
    for name, row in paper["table_6"].items():
        mnli, average, squad = row["paper"].split()
        ours = GLUE_ROWS[f"METRO-LM {name}, Table 6"]
        assert (ours["MNLI-m/mm"], ours.get("AVG All", "-"), ours["SQuAD 2.0"]) == (mnli, average, squad)
    rows = {"ELECTRA": "ELECTRA", "COCO-LM": "COCO-LM", "Combo + Constrained Embedding Sharing": "METRO-LM"}
    for name, printed in rows.items():
        mnli, averages, squad = paper["table_2"][name]["paper"].split()
        ours = GLUE_ROWS[f"{printed} base, Table 2"]
        assert (ours["MNLI-m/mm"], f"{ours['AVG Large']}/{ours['AVG All']}", ours["SQuAD 2.0"]) == (
            mnli, averages, squad,
        )  # fmt: skip
    assert [row["COPA"] for row in SUPERGLUE_ROWS.values()] == ["97.0"]


@pytest.mark.parametrize("name", [name for name, row in GLUE_ROWS.items() if all(one in row for one in GLUE_COLUMNS)])
def test_published_rows_have_the_average_of_their_cells(name: str) -> None:
    row = GLUE_ROWS[name]
    numbers = [fmean(map(float, row[column].split("/"))) for column in GLUE_COLUMNS]
    # UniLM's is printed so, here and in COCO-LM's paper.
    assert float(row["AVG All"]) == pytest.approx(fmean(numbers), abs=0.2 if "UniLM" in name else 0.1)


def test_pictures_have_a_box_a_row_and_a_line_a_run() -> None:
    rows = ["a/1", "a/2", "b/1", "bert"]
    found = [one for i, row in enumerate(rows) for one in three_seeds("rte", "accuracy", base=0.5 + i / 10, model=row)]
    found += [outcome("cola", seed, "a/1", "crash") for seed in (1, 2)]
    (axes, empty) = box_plots(of_points(found)).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == rows
    assert axes.get_lines()[-1].get_ydata().tolist() == pytest.approx([70.0, 80.0, 90.0])
    assert empty.get_title() == "cola"
    costs = {"a/1": 1e18, "a/2": 2e18, "b/1": 3e18}
    figure = flops_curves(of_points(found), lambda row: costs.get(dict(row)["model"]))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines == {"a": [[1e18, 50.0], [2e18, pytest.approx(60.0)]], "b": [[3e18, pytest.approx(70.0)]]}
    assert flops_curves(of_points(found), lambda row: 1e18) is None
