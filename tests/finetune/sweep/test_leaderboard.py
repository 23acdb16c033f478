"""Files for the servers: rows, labels and forms, and that the tasks predict what they ask for."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from metro_megatron.finetune.source import Source
from metro_megatron.finetune.sweep.leaderboard import GLUE, SUPERGLUE, File, Server, write_submission
from metro_megatron.finetune.task import Task
from metro_megatron.finetune.tasks import TaskName
from tests.finetune.layouts import write_glue, write_superglue
from tests.finetune.sweep.test_table import outcome


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


def test_glue_takes_what_the_models_of_superglue_say_of_shared_tests(tmp_path: Path) -> None:
    files = {file.name: file for file in GLUE.files}
    predictions = {
        ("superglue_rte", "glue_test"): answers(files["RTE.tsv"], ["entailment", "not_entailment"]),
        ("wsc", "wnli_test"): answers(files["WNLI.tsv"], ["true", "false"]),
    }
    problems = submit(GLUE, tmp_path, predictions)
    assert len(problems) == 9 and "GLUE/QNLI.tsv: missing, no run of qnli" in problems
    assert (tmp_path / "out" / "GLUE" / "WNLI.tsv").read_text().startswith("index\tprediction\n0\t1\n1\t0\n")
    assert "\n2999\tnot_entailment\n" in (tmp_path / "out" / "GLUE" / "RTE.tsv").read_text()
    submit(GLUE, tmp_path, {("wnli", "test"): answers(files["WNLI.tsv"], ["0"]), **predictions})
    assert (tmp_path / "out" / "GLUE" / "WNLI.tsv").read_text().startswith("index\tprediction\n0\t0\n1\t0\n")


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


def outputs_of(task: Task[Any]) -> np.ndarray:
    """Random ones of the right shape."""
    examples = task.validation
    generator = np.random.default_rng(0)
    if task.name == "multiple_choice" and hasattr(examples[0], "entities"):
        return generator.normal(size=(sum(len(one.entities) for one in examples), 1)).astype(np.float32)
    columns = {"regression": 1, "multiple_choice": 2}.get(task.name) or len(task.settings()["id2label"])
    return generator.normal(size=(len(examples), columns)).astype(np.float32)


def test_the_tasks_predict_what_the_servers_ask_for(tmp_path: Path) -> None:
    """Of tiny files in the layouts of the benchmarks every file of a submission comes out, but for the counts."""
    for server, write in ((GLUE, write_glue), (SUPERGLUE, write_superglue)):
        data = write(tmp_path / server.name)
        files, predictions = [], {}
        for file in server.files:
            task = Source(data=str(data)).read(cast(TaskName, file.task)).others[file.test]
            lines = task.predictions((outputs_of(task),), [{}] * len(task.validation))
            files.append(replace(file, count=len(lines)))
            predictions[file.task, file.test] = lines
        assert submit(Server(server.name, tuple(files), server.write), tmp_path, predictions) == []
        names = {path.name for path in (tmp_path / "out" / server.name).iterdir()}
        assert (
            names == {file.name for file in server.files} and len(names) == {"GLUE": 11, "SuperGLUE": 10}[server.name]
        )
