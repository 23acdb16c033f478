"""What is learned is what the files say: windows of a text, tags of words, choices, several labels."""

import json
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.tasks import TaskKind, task_class
from tests.finetune.test_classification import good_or_bad

RECIPE = Recipe(
    learning_rate=5e-3, batch_size=16, epochs=4, warmup_steps=5, max_length=24, device="cpu", from_scratch=True
)


def question(i: int) -> dict[str, Any]:
    """ "good" or "bad" in a context; the last words lie in another window than the first."""
    words, answer = ["the old house", "a green bird", "the river", "a cat", "the dog"], ("good", "bad")[i % 2]
    context = " ".join([*(words[(i + j) % 5] for j in range(3 * (i % 3))), answer, words[i % 5]])
    return {"question": f"a cat {i}", "context": context, "answer": answer}


def tagged(i: int) -> dict[str, Any]:
    words = good_or_bad(1, i).first[0].split()
    return {"tokens": words, "tags": ["B-X" if word in ("good", "house", "river") else "O" for word in words]}


def choice(i: int) -> dict[str, Any]:
    choices = [" ".join(good_or_bad(i + 2, i).first[place].split()) for place in (0, 1)]  # the first has "good"
    return {"text": "a tree", "choices": choices[:: 1 - 2 * (i % 2)], "label": i % 2}


def labelled(i: int) -> dict[str, Any]:
    texts = good_or_bad(2, i)
    return {"text": texts.first[i % 2], "labels": [["p"], ["q", "r"]][i % 2]}


CASES = {
    "span": (question, 120),
    "token": (tagged, 160),
    "multiple_choice": (choice, 160),
    "multi_label": (labelled, 400),
}


@pytest.mark.parametrize("name", CASES)
def test_learns_what_the_files_say(export_folder: Path, tmp_path: Path, name: TaskKind) -> None:
    make, count = CASES[name]
    paths = [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]
    for path, numbers in zip(paths, (range(count), range(count, count + 18)), strict=True):
        path.write_text("".join(json.dumps(make(i)) + "\n" for i in numbers))
    task = task_class(name).read(*paths)
    result = finetune(task, export_folder, tmp_path / "out", RECIPE)
    assert result[task.score_names[0]] > 0.8, result["epochs"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    if name == "span":
        assert result["exact"] == sum([line["prediction"]] == line["label"] for line in lines) / 18
