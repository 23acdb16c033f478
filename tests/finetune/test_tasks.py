"""Every formulation takes a step, scores, predicts and is written: on our export, and on encoders of transformers."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.source import Source
from metro_megatron.finetune.tables import Layout
from metro_megatron.finetune.tasks import GlueName, SquadName, SuperGlueName
from tests.finetune.encoders import write_encoder
from tests.finetune.layouts import SENTENCES, write_glue, write_squad, write_superglue

RECIPE = Recipe(learning_rate=1e-3, batch_size=8, epochs=1, warmup_steps=0, device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in (("glue", write_glue), ("superglue", write_superglue), ("squad", write_squad)):
        write(root / name)
    return root


def run(name: Any, source: Source, model: Path, output: Path) -> dict[str, Any]:
    task = source.read(name)
    result = finetune(task, model, output, RECIPE)
    assert json.loads((output / "metrics.json").read_text()) == result
    assert result["task"] == name and all(math.isfinite(result[score]) for score in result["score_names"])
    for other in ("", *(f"_{one}" for one in task.others)):
        asked = task.others[other[1:]] if other else task
        lines = [json.loads(line) for line in (output / f"predictions{other}.jsonl").read_text().splitlines()]
        assert lines and all("prediction" in line for line in lines)
        assert ("label" in lines[0]) == (not other.startswith(("_test", "_predict")) and other != "_ax"), (other, lines[0])
        assert len(lines) == len(asked.validation)
    return result


@pytest.mark.parametrize("name", [*get_args(GlueName), *get_args(SuperGlueName), *get_args(SquadName)])
def test_benchmarks(data: Path, bert: Path, export_folder: Path, tmp_path: Path, name: str) -> None:
    folder = next(f for f, n in (("glue", GlueName), ("superglue", SuperGlueName), ("squad", SquadName)) if name in get_args(n))
    # Each head with both; else in turn.
    heads = ("mnli", "stsb", "copa", "record", "squad", "squad2")
    models = [bert, export_folder] if name in heads else [bert if len(name) % 2 else export_folder]
    for i, model in enumerate(models):
        result = run(name, Source(data=str(data / folder)), model, tmp_path / str(i))
    if name == "mnli":
        assert result["accuracy_mm"] == result["accuracy"]
    if name == "superglue_rte":
        assert result["score_names"] == ["accuracy", "mcc_axb", "accuracy_axb", "accuracy_axg", "gender_parity_axg"]
