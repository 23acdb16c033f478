"""Fine-tuning learns what can be learned, repeats itself, and leaves a folder that transformers loads."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.models import read_tokenizer
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.task import Encoded
from metro_megatron.finetune.tasks import TaskKind, task_class
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import MetroModel
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tests.hf.pair import WORDS

RECIPE = Recipe(learning_rate=2e-3, batch_size=16, epochs=3, warmup_steps=5, device="cpu")


def classify(
    folder: Path, train: LabelledTexts[str], validation: LabelledTexts[str], output: Path, recipe: Recipe
) -> dict[str, Any]:
    return finetune(Classification(train, validation), folder, output, recipe)


def good_or_bad(count: int, seed: int, is_pair: bool = False) -> LabelledTexts:
    """Sentences of made-up words; the label says whether "good" or "bad" is among them."""
    generator = random.Random(seed)
    first, labels = [], []
    for i in range(count):
        label = ("good", "bad")[i % 2]
        words = generator.choices([word for word in WORDS if word not in ("good", "bad")], k=5)
        words.insert(generator.randrange(6), label)
        first.append(" ".join(words))
        labels.append(label)
    return LabelledTexts(first, ["a tree"] * count if is_pair else None, labels)


@pytest.mark.parametrize("is_pair", [False, True])
def test_learns_and_writes_a_folder_that_loads(
    export_folder: Path, tmp_path: Path, remote_code: None, is_pair: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = good_or_bad(320, 1, is_pair), good_or_bad(64, 2, is_pair)
    output = tmp_path / "out"
    recipe = replace(RECIPE, epochs=6, learning_rate=5e-3, from_scratch=True)
    result = classify(export_folder, train, validation, output, recipe)
    assert result["accuracy"] > 0.9
    printed = capsys.readouterr().out
    assert "320 training and 64 validation texts, 2 classes; 0 and 0 cut" in printed
    assert "epoch 6/6: validation accuracy" in printed

    assert json.loads((output / "metrics.json").read_text()) == result
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == validation.labels
    correct = sum(line["prediction"] == line["label"] for line in lines)
    assert correct / len(lines) == result["accuracy"]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert model.config.id2label == {0: "bad", 1: "good"}
    for i, line in enumerate(lines[:8]):
        text_pair = validation.second[i] if validation.second else None
        inputs = tokenizer(validation.first[i], text_pair, return_tensors="pt")
        chances = model(**inputs).logits.softmax(-1)[0]
        assert chances[1].item() == pytest.approx(line["probabilities"]["good"], abs=1e-4)


def test_repeats_itself_and_differs_with_seed_and_start(export_folder: Path, tmp_path: Path) -> None:
    train, validation = good_or_bad(40, 3), good_or_bad(12, 4)
    recipe = replace(RECIPE, epochs=1)

    def losses(recipe: Recipe) -> float:
        return classify(export_folder, train, validation, tmp_path / "out", recipe)["loss"]

    first = losses(recipe)
    assert losses(recipe) == first
    assert losses(replace(recipe, seed=2)) != first
    assert losses(replace(recipe, from_scratch=True)) != first


def test_the_pretrained_weights_are_what_it_starts_from(export_folder: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, learning_rate=0.0)
    classify(export_folder, good_or_bad(4, 5), good_or_bad(4, 6), tmp_path / "out", recipe)
    before, after = (MetroModel.from_pretrained(folder).state_dict() for folder in (export_folder, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    classify(export_folder, good_or_bad(4, 5), good_or_bad(4, 6), tmp_path / "out", replace(recipe, from_scratch=True))
    fresh = MetroModel.from_pretrained(tmp_path / "out").state_dict()
    name = "encoder.layer.1.intermediate.weight"
    assert fresh[name].std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert not torch.equal(before[name], fresh[name])


def test_ids_are_those_of_pretraining_whatever_the_text_spells(export_folder: Path) -> None:
    text = "the <s> cat </s> a <mask><pad>"
    own = Tokenizer.from_folder(export_folder).encode(text)
    tokenizer = read_tokenizer(export_folder, MetroConfig.from_pretrained(export_folder), 0)
    task = Classification(LabelledTexts([text, text], None, ["x", "w"]), LabelledTexts([text], None, ["w"]))
    assert task.encode(tokenizer, task.validation) == Encoded([{"input_ids": [0, *own, 2], "label": 0}], 0)


def test_every_task_has_its_name() -> None:
    assert [task_class(name).name for name in get_args(TaskKind)] == list(get_args(TaskKind))


def test_long_texts_are_cut_counted_and_said(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = good_or_bad(8, 7), good_or_bad(4, 8)
    train.first[2] += " the cat" * 100
    validation.first[0] += " the cat" * 100
    result = classify(export_folder, train, validation, tmp_path / "out", replace(RECIPE, epochs=1, max_length=30))
    assert result["num_cut"] == 2
    printed = capsys.readouterr().out
    assert "1 and 1 cut to 30 tokens" in printed
    assert "warm-up takes 0 steps, half of all, instead of 5" in printed


def test_mistakes_are_said_before_anything_is_written(export_folder: Path, tmp_path: Path) -> None:
    train, validation = good_or_bad(8, 9), good_or_bad(4, 10)
    output = tmp_path / "out"
    cases = [
        (export_folder, replace(RECIPE, max_length=41), "max_length is 41, but the model has 40 positions"),
        (export_folder, replace(RECIPE, max_length=3), "give at least 8"),
        (export_folder, replace(RECIPE, epochs=0, batch_size=-1), "batch_size is -1(.|\n)*epochs is 0"),
        (export_folder, replace(RECIPE, learning_rate=float("nan")), "learning_rate is nan"),
        (tmp_path / "nowhere", RECIPE, "no such folder; a model of the hub must be downloaded first"),
    ]
    for folder, recipe, message in cases:
        with pytest.raises(UserError, match=message):
            classify(folder, train, validation, output, recipe)
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 'notes.txt'"):
        classify(export_folder, train, validation, output, RECIPE)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
