"""Regression learns a number that the text tells, and its figures are scipy's."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import transformers

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.metrics import correlations
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import finetune
from metro_megatron.finetune.tasks.regression import Regression, number_label
from tests.finetune.test_classification import good_or_bad

RECIPE = Recipe(learning_rate=5e-3, batch_size=16, epochs=6, warmup_steps=5, device="cpu", from_scratch=True)


def numbers(count: int, seed: int) -> LabelledTexts[float]:
    """ "good" is worth 2.5 and "bad" -0.5."""
    texts = good_or_bad(count, seed)
    return LabelledTexts(texts.first, None, [2.5 if label == "good" else -0.5 for label in texts.labels])


def test_learns_and_writes_a_folder_that_loads(
    export_folder: Path, tmp_path: Path, remote_code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = numbers(320, 1), numbers(32, 2)
    result = finetune(Regression(train, validation), export_folder, tmp_path / "out", RECIPE)
    assert result["pearson"] > 0.9 and result["spearman"] > 0.8
    printed = capsys.readouterr().out
    assert "320 training and 32 validation texts, labels from -0.5 to 2.5; 0 and 0 cut" in printed
    assert "epoch 6/6: validation pearson" in printed

    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    labels, predictions = (np.array([line[key] for line in lines]) for key in ("label", "prediction"))
    assert labels.tolist() == validation.labels
    assert result["pearson"] == pytest.approx(scipy.stats.pearsonr(labels, predictions).statistic)
    assert result["spearman"] == pytest.approx(scipy.stats.spearmanr(labels, predictions).statistic)
    assert result["loss"] == pytest.approx(((labels - predictions) ** 2).mean(), rel=1e-5)

    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "out"), trust_remote_code=True)
    for text, prediction in zip(validation.first[:4], predictions, strict=False):
        assert pipeline(text)[0]["score"] == pytest.approx(prediction, abs=1e-4)


@pytest.mark.parametrize("size", [2, 5, 100])
@pytest.mark.parametrize("kinds", [2, 4, 1000])
def test_correlations_are_those_of_their_definitions(size: int, kinds: int) -> None:
    generator = np.random.default_rng(size + kinds)
    x = np.concatenate([[0.0, kinds], generator.integers(kinds, size=size)])
    y = (x + generator.normal(size=size + 2)).astype(np.float32)
    centred = [one - one.mean() for one in (x, y.astype(np.float64))]
    pearson = centred[0] @ centred[1] / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    assert correlations(y, x)["pearson"] == pytest.approx(pearson)
    ranks = [scipy.stats.rankdata(one) for one in (x, y)]
    assert correlations(y, x)["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("flat", [[0.1] * 3, [np.nan, 1.0, 2.0], [7.0]])
def test_an_undefined_correlation_is_zero(flat: list[float]) -> None:
    scores = correlations(np.array(flat), np.arange(len(flat), dtype=np.float64))
    assert scores == {"pearson": 0.0, "spearman": 0.0}


def test_labels_are_numbers_named_by_file_and_line(tmp_path: Path) -> None:
    assert [number_label(value) for value in (1, -0.5, "2", " 1e-3 ", "+4.25")] == [1, -0.5, 2, 1e-3, 4.25]
    good, bad = tmp_path / "good.csv", tmp_path / "bad.jsonl"
    good.write_text("text_a,text_b,label\na,b,1\nc,d,2.5\n")
    hostile = ("1_0", "good", "nan", "-inf", "1e999", True, [1], {"a": 1}, 10**400, "", None)
    for label in hostile:
        bad.write_text(json.dumps({"text": "a", "label": 1}) + "\n" + json.dumps({"text": "b", "label": label}) + "\n")
        with pytest.raises(UserError, match=r"bad.jsonl, line 2: (label .* is not a finite number|has no label)"):
            Regression.read(good, bad)
    bad.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(UserError) as caught:
        Regression.read(bad, tmp_path / "none.csv")
    assert caught.value.problems == [f"{bad}, line 2: has no label", f"{tmp_path / 'none.csv'}: no such file"]
    assert Regression.read_examples(good) == LabelledTexts(["a", "c"], ["b", "d"], [1.0, 2.5])


def test_labels_that_teach_nothing() -> None:
    single, pair = LabelledTexts(["a", "b"], None, [2.0, 2.0]), LabelledTexts(["a"], ["b"], [1.0])
    with pytest.raises(UserError, match="two of a kind\nall 2 training texts have the label 2; regression needs two"):
        Regression(single, pair).settings()
