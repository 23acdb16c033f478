"""Tables, pictures and leaderboard files against figures by hand and what is printed in the paper."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from metro_megatron.finetune.sweep.leaderboard import GLUE, SUPERGLUE, File, Server, write_submission
from metro_megatron.finetune.sweep.outcome import Outcome
from metro_megatron.finetune.sweep.pictures import box_plots, flops_curves
from metro_megatron.finetune.sweep.plan import Run
from metro_megatron.finetune.sweep.points import Point, points
from metro_megatron.finetune.sweep.published import GLUE_COLUMNS, GLUE_ROWS, SUPERGLUE_ROWS
from metro_megatron.finetune.sweep.table import LAYOUTS, markdown
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


def test_our_scores_of_tasks_are_those_that_the_layout_shows() -> None:
    for layout in LAYOUTS:
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


def submit(server: Server, root: Path, predictions: dict[tuple[str, str], list[object]]) -> list[str]:
    best = {}
    for (task, test), lines in predictions.items():
        best[task] = outcome(task, 1, accuracy=0.5)
        folder = root / "runs" / best[task].run.name
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"predictions_{test}.jsonl").write_text(text)
    return write_submission(server, best, root / "runs", root / "out")


def answers(file: File, labels: list[object]) -> list[object]:
    return [{"id": str(i), "prediction": labels[i % len(labels)]} for i in range(file.count)]


def test_glue_files_have_the_rows_of_the_tests(tmp_path: Path) -> None:
    labels = {file.name: list(file.labels) or [6.0, -1.0, 2.34567] for file in GLUE.files}
    predictions = {
        (file.task, file.test): answers(file, labels[file.name]) for file in GLUE.files if file.task != "qqp"
    }
    predictions["cola", "test"].pop()
    predictions["sst2", "test"][0]["prediction"] = "positive"
    predictions["wnli", "test"].reverse()
    problems = submit(GLUE, tmp_path, predictions)
    for problem, said in zip(
        problems,
        [
            "GLUE/CoLA.tsv: missing, .* has 1,062 predictions, the test has 1,063",
            "GLUE/SST-2.tsv: missing, .* has the label 'positive', the server knows 0, 1",
            "GLUE/QQP.tsv: missing, no run of qqp",
            "GLUE/WNLI.tsv: missing, .* has not the rows of the test, 0 and on, in their order",
        ],
        strict=True,
    ):
        assert re.fullmatch(said, problem)
    folder = tmp_path / "out" / "GLUE"
    assert {path.name for path in folder.iterdir()} == {
        "MRPC.tsv", "STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv", "RTE.tsv", "AX.tsv",
    }  # fmt: skip
    with (folder / "STS-B.tsv").open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[:4] == [["index", "prediction"], ["0", "5.000"], ["1", "0.000"], ["2", "2.346"]] and len(rows) == 1380
    text = (folder / "MNLI-mm.tsv").read_text()
    assert text.startswith("index\tprediction\n0\tentailment\n1\tneutral\n") and text.count("\n") == 9848


def test_superglue_files_have_the_server_s_forms(tmp_path: Path) -> None:
    small = {"boolq": 2, "cb": 1, "copa": 2, "multirc": 3, "record": 1, "wsc": 2}
    files = tuple(
        File(file.name, file.task, small[file.task], file.labels, file.test)
        for file in SUPERGLUE.files
        if file.task in small
    )
    place = [{"paragraph": 7, "question": question, "answer": answer} for question, answer in ((3, 0), (3, 1), (4, 2))]
    predictions = {
        ("boolq", "test"): [{"id": 0, "prediction": "true"}, {"id": 1, "prediction": "false"}],
        ("cb", "test"): [{"id": 0, "prediction": "neutral"}],
        ("copa", "test"): [{"id": 0, "prediction": 1}, {"id": 1, "prediction": 0}],
        ("multirc", "test"): [{"id": one, "prediction": str(i % 2)} for i, one in enumerate(place)],
        ("record", "test"): [{"id": 9, "prediction": "São Paulo"}],
        ("wsc", "test"): [{"id": 0, "prediction": "true"}, {"id": 1, "prediction": "false"}],
    }
    assert submit(Server("SuperGLUE", files, SUPERGLUE.write), tmp_path, predictions) == []
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "out" / "SuperGLUE").iterdir()
    }
    questions = [
        {"idx": 3, "answers": [{"idx": 0, "label": 0}, {"idx": 1, "label": 1}]},
        {"idx": 4, "answers": [{"idx": 2, "label": 0}]},
    ]
    assert found == {
        "BoolQ": [{"idx": 0, "label": "true"}, {"idx": 1, "label": "false"}],
        "CB": [{"idx": 0, "label": "neutral"}],
        "COPA": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}],
        "MultiRC": [{"idx": 7, "passage": {"questions": questions}}],
        "ReCoRD": [{"idx": 9, "label": "São Paulo"}],
        "WSC": [{"idx": 0, "label": "True"}, {"idx": 1, "label": "False"}],
    }


def test_no_test_predictions_no_submission(tmp_path: Path) -> None:
    assert write_submission(GLUE, {"rte": outcome("rte", 1, accuracy=0.5)}, tmp_path, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()
