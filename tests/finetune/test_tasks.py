"""Every formulation takes a step, is scored and predicts: on our export, and on encoders of transformers."""

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from metro_megatron.finetune.models import build_model, read_config, read_tokenizer
from metro_megatron.finetune.others import LABELS
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.source import Source
from metro_megatron.finetune.task import Task
from metro_megatron.finetune.tasks import BenchmarkName, GlueName, NliName, SquadName, SuperGlueName
from metro_megatron.finetune.tasks.multi_label import MultiLabel
from metro_megatron.finetune.tasks.ranking import Ranking
from metro_megatron.finetune.tasks.regression import Regression
from tests.finetune.encoders import KINDS, tokenizer_of, write_encoder
from tests.finetune.layouts import write_glue, write_nli, write_squad, write_superglue

RECIPE = Recipe(learning_rate=1e-3, batch_size=8, epochs=1, warmup_steps=0, device="cpu")
WORDS = ("the old cat", "a good dog", "the river", "a bird", "a Zoë-like 東京", "the “green” bird")
TAGS = ("O B-X I-X", "O O B-X", "O B-Y", "O B-X", "O O B-Y", "O O B-X")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in (
        ("glue", write_glue),
        ("superglue", write_superglue),
        ("squad", write_squad),
        ("nli", write_nli),
    ):
        write(root / name)
    return root


@pytest.fixture(scope="module", params=["bert", "metro"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, export_folder: Path) -> Path:
    return export_folder if request.param == "metro" else write_encoder("bert", tmp_path_factory.mktemp("bert"))


def of_benchmark(data: Path, name: Any) -> Task[Any]:
    folders = {"glue": GlueName, "superglue": SuperGlueName, "squad": SquadName, "nli": NliName}
    (folder,) = (folder for folder, names in folders.items() if name in get_args(names))
    return Source(data=str(data / folder)).read(name)


@dataclass
class Learner:
    """A task's model, and what goes through it as the Trainer would have it."""

    task: Task[Any]
    folder: Path

    def __post_init__(self) -> None:
        config = read_config(self.folder, self.task.settings())
        self.tokenizer = read_tokenizer(self.folder, config, 0)
        torch.manual_seed(0)
        self.model = build_model(self.task.head, self.folder, config, False)
        self.taken = {"label", *inspect.signature(self.model.forward).parameters}

    def outputs(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor | None, tuple[np.ndarray, ...]]:
        seen = [{name: value for name, value in row.items() if name in self.taken} for row in rows]
        found = self.model(**self.task.collator(self.tokenizer)(seen))
        names = [name for name in found if name.endswith("logits")]
        return found.get("loss"), tuple(found[name].detach().numpy() for name in names)

    def step(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        losses = []
        for _ in range(2):
            loss, _ = self.outputs(self.task.encode(self.tokenizer, self.task.train).rows)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(map(math.isfinite, losses)) and losses[0] != losses[1]

    def answers(self, task: Task[Any]) -> list[dict[str, Any]]:
        """Lines of predictions of a task's validation, which are scored if there are labels."""
        self.model.eval()
        rows = task.encode(self.tokenizer, task.validation).rows
        _, outputs = self.outputs(rows)
        if any(name in rows[0] for name in LABELS):
            scores = task.scores(outputs, rows)
            assert all(math.isfinite(scores[name]) for name in task.score_names)
        lines = task.predictions(outputs, rows)
        assert len(lines) == len(task.validation)
        return lines


@pytest.mark.parametrize("name", get_args(BenchmarkName))
def test_benchmarks(data: Path, model: Path, name: str) -> None:
    task = of_benchmark(data, name)
    learner = Learner(task, model)
    learner.step()
    assert all("label" in line for line in learner.answers(task))
    for asked in task.others.values():
        lines = learner.answers(asked)
        labels, ids = (getattr(asked.validation, key, None) for key in ("labels", "ids"))
        assert all(("label" in line) == bool(labels) for line in lines)
        assert [line["id"] for line in lines] == (ids or [0, 1])


def write_free(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of a table for every kind of task; the first half of the rows is for training."""
    rows: dict[str, list[dict[str, Any]]] = {
        "multi_label": [{"text": text, "labels": ["a", "b"][: i % 3]} for i, text in enumerate(WORDS)],
        "token": [{"tokens": a.split(), "tags": b.split()} for a, b in zip(WORDS, TAGS, strict=True)],
        "multiple_choice": [
            {"text": text, "choices": [*WORDS[:2], "a"][: 2 + (i % 3 > 0)], "label": i % 3}
            for i, text in enumerate(WORDS)
        ],
        "span": [
            {
                "question": "who?",
                "context": text,
                "answers": {"text": [text.split()[-1]], "answer_start": [text.rindex(" ") + 1]},
            }
            for text in WORDS
        ],
    }
    found = {}
    for name, lines in rows.items():
        for part, some in (("train", lines[:3]), ("validation", lines[3:]), ("predict", lines[3:])):
            path = folder / f"{name}_{part}.jsonl"
            hidden = ("labels", "tags", "label", "answers") if part == "predict" else ()
            written = [{key: value for key, value in line.items() if key not in hidden} for line in some]
            path.write_text("".join(json.dumps(line) + "\n" for line in written))
            found.setdefault(name, {})[f"{part}_file"] = str(path)
    return found


@pytest.mark.parametrize("name", ["multi_label", "token", "multiple_choice", "span"])
def test_free_tasks(tmp_path: Path, model: Path, name: Any) -> None:
    task = Source(**write_free(tmp_path)[name]).read(name)
    learner = Learner(task, model)
    learner.step()
    scored, predicted = learner.answers(task), learner.answers(task.others["predict"])
    assert [line["prediction"] for line in scored] == [line["prediction"] for line in predicted]
    assert not any("label" in line for line in predicted)


@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2"])
def test_every_head_of_other_architectures(data: Path, tmp_path: Path, kind: str) -> None:
    folder = write_encoder(kind, tmp_path / kind)
    tasks = [of_benchmark(data, name) for name in ("rte", "copa", "squad2")]
    tasks.append(Source(**write_free(tmp_path)["token"]).read("token"))
    for task in tasks:
        learner = Learner(task, folder)
        learner.step()
        learner.answers(task)


def perfect(task: Task[Any], rows: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
    """The outputs of a model that knows all labels of the rows."""
    if task.head == "question_answering":
        length = max(len(row["input_ids"]) for row in rows)
        return tuple(9 * np.eye(length)[[row[f"{side}_positions"] for row in rows]] for side in ("start", "end"))
    if task.head == "token_classification":
        length = max(len(row["labels"]) for row in rows)
        labels = [row["labels"] + [-100] * (length - len(row["labels"])) for row in rows]
        return (np.eye(len(task.names))[np.maximum(labels, 0)],)
    if isinstance(task, Ranking):
        return (np.array([[float(name in one.answers)] for one in task.validation for name in one.entities]),)
    labels = np.array([row["label"] for row in rows])
    if isinstance(task, MultiLabel):
        return (labels - 0.5,)
    return (labels[:, None],) if isinstance(task, Regression) else (np.eye(labels.max() + 1)[labels],)


@pytest.mark.parametrize("kind", ["metro", *KINDS])
def test_who_knows_the_labels_gets_full_marks(data: Path, export_folder: Path, tmp_path: Path, kind: str) -> None:
    """Labels and answers are found again in the rows of every kind of tokenizer."""
    tokenizer = tokenizer_of(kind) if kind in KINDS else PreTrainedTokenizerFast.from_pretrained(export_folder)
    tokenizer.model_max_length = 40
    tasks = [of_benchmark(data, name) for name in get_args(BenchmarkName)]
    tasks += [Source(**options).read(name) for name, options in write_free(tmp_path).items()]
    for task in tasks:
        rows = task.encode(tokenizer, task.validation).rows
        outputs = perfect(task, rows)
        scores = task.scores(outputs, rows)
        assert {name: scores[name] for name in task.score_names} == pytest.approx(dict.fromkeys(task.score_names, 1))
        for line in task.predictions(outputs, rows):
            if task.head != "question_answering" and not isinstance(task, Ranking | Regression | MultiLabel):
                assert line["prediction"] == line["label"]


@pytest.mark.parametrize("name", ["mnli", "record", "squad2"])
def test_a_whole_run(data: Path, export_folder: Path, tmp_path: Path, name: str) -> None:
    task = of_benchmark(data, name)
    result = finetune(task, export_folder, tmp_path / "out", RECIPE)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert result["task"] == name and all(math.isfinite(result[score]) for score in result["score_names"])
    for other in ("", *(f"_{one}" for one in task.others)):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"predictions{other}.jsonl").read_text().splitlines()]
        assert len(lines) == len(task.validation) and all("prediction" in line for line in lines)
    if name == "mnli":
        assert result["accuracy_mm"] == result["accuracy"] and result["majority_share"] == 0.5
    assert ("loss" in result["epochs"][0]) == (name != "record")
    # The same command again replaces what it wrote.
    finetune(task, export_folder, tmp_path / "out", RECIPE)
