"""Files for the servers of GLUE and SuperGLUE, from what runs have predicted for the tests.

GLUE takes eleven tables with index and prediction, SuperGLUE ten files of JSON lines with idx and label; both take them
zipped. A file is written only where it has the server's number of rows and labels that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from metro_megatron.files import replace_text
from metro_megatron.finetune.names import BOOLEAN
from metro_megatron.finetune.sweep.outcome import Outcome, read_predictions

Line: TypeAlias = Mapping[str, Any]
"""Of a file of predictions: id and prediction."""
NLI = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
BINARY = ("0", "1")


@dataclass(frozen=True)
class Shared:
    """Another task whose model is asked the same test (METRO appendix A: WSC and RTE)."""

    task: str
    test: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """The server's by its own, where they differ."""


@dataclass(frozen=True)
class File:
    """One file of a submission."""

    name: str
    task: str
    """Whose run has predicted it."""
    count: int
    """Examples of the test: of MultiRC answers."""
    labels: tuple[str, ...] = ()
    """Those that the server knows; none: any."""
    test: str = "test"
    """The set of the task's, by its name in predictions_NAME.jsonl."""
    shared: Shared | None = None
    """Who else has predicted it, where there is no run of the task."""

    def problem(self, lines: Sequence[Line]) -> str:
        """Why the server would refuse it, or an empty string."""
        if len(lines) != self.count:
            return f"has {len(lines):,} predictions, the test has {self.count:,}"
        unknown = {str(line["prediction"]) for line in lines} - set(self.labels) if self.labels else set()
        if unknown:
            return f"has the label {min(unknown)!r}, the server knows {', '.join(self.labels)}"
        ids = [str(line.get("id", number)) for number, line in enumerate(lines)]
        is_counted = not self.name.endswith(".tsv") or ids == list(map(str, range(self.count)))
        return "" if is_counted else "has not the rows of the test, 0 and on, in their order"


@dataclass(frozen=True)
class Server:
    """A benchmark's: its files, and how one is written."""

    name: str
    files: tuple[File, ...]
    write: Callable[[File, Sequence[Line]], str]


def glue_table(file: File, lines: Sequence[Line]) -> str:
    """A table; numbers of STS-B lie between 0 and 5."""
    labels = [line["prediction"] for line in lines]
    if file.task == "stsb":
        labels = [f"{min(5.0, max(0.0, label)):.3f}" for label in labels]
    return "index\tprediction\n" + "".join(f"{number}\t{label}\n" for number, label in enumerate(labels))


def superglue_lines(file: File, lines: Sequence[Line]) -> str:
    """JSON lines; MultiRC's have a passage with all answers to all its questions."""
    found = multirc_passages(lines) if file.task == "multirc" else plain_labels(file, lines)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)


def plain_labels(file: File, lines: Iterable[Line]) -> list[dict[str, Any]]:
    """idx and label: a number for COPA, True and False for WSC, else as it is predicted."""
    written: dict[str, Callable[[Any], int | str]] = {"copa": int, "wsc": str.capitalize}
    as_written = written.get(file.task, str)
    return [{"idx": line["id"], "label": as_written(line["prediction"])} for line in lines]


def multirc_passages(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Answers by question and passage, in their order."""
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for line in lines:
        place = line["id"]
        answers = passages.setdefault(place["paragraph"], {}).setdefault(place["question"], [])
        answers.append({"idx": place["answer"], "label": int(line["prediction"])})
    return [
        {
            "idx": passage,
            "passage": {"questions": [{"idx": number, "answers": answers} for number, answers in questions.items()]},
        }
        for passage, questions in passages.items()
    ]


GLUE = Server(
    "GLUE",
    (
        File("CoLA.tsv", "cola", 1063, BINARY),
        File("SST-2.tsv", "sst2", 1821, BINARY),
        File("MRPC.tsv", "mrpc", 1725, BINARY),
        File("STS-B.tsv", "stsb", 1379),
        File("QQP.tsv", "qqp", 390965, BINARY),
        File("MNLI-m.tsv", "mnli", 9796, NLI, "test_m"),
        File("MNLI-mm.tsv", "mnli", 9847, NLI, "test_mm"),
        File("QNLI.tsv", "qnli", 5463, TWO_WAY),
        File("RTE.tsv", "rte", 3000, TWO_WAY, shared=Shared("superglue_rte", "glue_test")),
        File(
            "WNLI.tsv", "wnli", 146, BINARY, shared=Shared("wsc", "wnli_test", dict(zip(BOOLEAN, BINARY, strict=True)))
        ),
        File("AX.tsv", "mnli", 1104, NLI, "ax"),
    ),
    glue_table,
)
SUPERGLUE = Server(
    "SuperGLUE",
    (
        File("BoolQ.jsonl", "boolq", 3245, BOOLEAN),
        File("CB.jsonl", "cb", 250, NLI),
        File("COPA.jsonl", "copa", 500, BINARY),
        File("MultiRC.jsonl", "multirc", 9693, BINARY),
        File("ReCoRD.jsonl", "record", 10000),
        File("RTE.jsonl", "superglue_rte", 3000, TWO_WAY),
        File("WiC.jsonl", "wic", 1400, BOOLEAN),
        File("WSC.jsonl", "wsc", 146, BOOLEAN),
        File("AX-b.jsonl", "superglue_rte", 1104, TWO_WAY, "axb"),
        File("AX-g.jsonl", "superglue_rte", 356, TWO_WAY, "axg"),
    ),
    superglue_lines,
)


def write_submission(server: Server, best: Mapping[str, Outcome], runs: Path, output: Path) -> list[str]:
    """Write output/SERVER/FILE of all files that the best run of their task has predicted; `best` has a run by task.

    Returns a line for every file that is missing, with the reason; none where no run has predicted any of them.
    """
    if not any(path.is_file() for file in server.files if (path := _predictions(file, best, runs))):
        return []
    problems = []
    for file in server.files:
        text, problem = _content(server, file, best, _predictions(file, best, runs))
        if problem:
            problems.append(f"{server.name}/{file.name}: missing, {problem}")
            continue
        (output / server.name).mkdir(parents=True, exist_ok=True)
        replace_text(output / server.name / file.name, text)
    return problems


def _predictions(file: File, best: Mapping[str, Outcome], runs: Path) -> Path | None:
    """Where they are, if there is a run of the task, or of the one that shares its model."""
    if file.task in best:
        return runs / best[file.task].run.name / f"predictions_{file.test}.jsonl"
    if file.shared and file.shared.task in best:
        path = runs / best[file.shared.task].run.name / f"predictions_{file.shared.test}.jsonl"
        return path if path.is_file() else None
    return None


def _content(server: Server, file: File, best: Mapping[str, Outcome], path: Path | None) -> tuple[str, str]:
    """What the file holds, or why it is not written."""
    if path is None:
        return "", f"no run of {file.task}"
    if not path.is_file():
        return "", f"{path.parent.name} had no {file.test} to predict"
    lines: Sequence[Line] = read_predictions(path)
    if file.shared and file.task not in best:
        lines = [
            {**line, "prediction": file.shared.labels.get(line["prediction"], line["prediction"])} for line in lines
        ]
    problem = file.problem(lines)
    return ("", f"{path} {problem}") if problem else (server.write(file, lines), "")
