"""tools/probe.py on an exported folder: features are transformers' own, and nothing is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metro_megatron.commands import probe as tool
from metro_megatron.errors import UserError
from metro_megatron.evaluate.frozen import frozen_features
from metro_megatron.probing.features import EncodedTexts
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tests.hf.pair import WORDS
from tests.probing.test_folder import write as write_tasks

TEXTS = [" ".join(WORDS[: 1 + number % 9] * (1 + number % 5)) for number in range(40)]


def test_features_are_means_of_single_texts(export_folder: Path) -> None:
    """Whatever they are batched with, behind any layer."""
    model = tool.load_encoder(export_folder, from_scratch=False, seed=1).eval()
    texts = EncodedTexts.of([[text] for text in TEXTS], Tokenizer.from_folder(export_folder), 38)
    for layer in (0, 1):
        found = frozen_features(model, texts, layer)
        for one, ids in zip(found, texts.ids, strict=True):
            with torch.no_grad():
                output = model(torch.tensor([[0, *ids.tolist(), 2]]), output_hidden_states=True)
            hidden = output.hidden_states[layer] if layer else output.last_hidden_state
            np.testing.assert_allclose(one, hidden[0, 1:-1].mean(0), atol=1e-5)


def test_the_command_writes_figures_baselines_and_items(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"r{number}", "text": text, "label": "ab"[number % 3 > 0]} for number, text in enumerate(TEXTS)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    tasks = write_tasks(tmp_path / "tasks", train=content, test=content)
    options = {"model": str(export_folder), "tasks": str(tasks), "device": "cpu"}
    results = []
    for name, more in (("one", {}), ("two", {}), ("random", {"from_scratch": True})):
        tool.main(tool.Options(output=str(tmp_path / name), **options, **more))
        results.append(json.loads((tmp_path / name / "probe.json").read_text()))
    first, second, random = results
    assert first == second
    facts = first["tasks"]["t"]
    assert facts["baselines"] == {"tfidf": 0.5, "random_weights": random["tasks"]["t"]["score"]}
    assert facts["metric"] == "mcc" and facts["score"] == facts["figures"]["mcc"] and facts["rows"] == len(rows)
    items = [json.loads(line) for line in (tmp_path / "one" / "items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == [row["id"] for row in rows] and {item["task"] for item in items} == {"t"}
    assert np.mean([item["score"] for item in items]) == pytest.approx(facts["figures"]["accuracy"])
    assert "random_weights" in capsys.readouterr().out


def test_refusals(export_folder: Path, tmp_path: Path) -> None:
    tasks = str(write_tasks(tmp_path / "tasks"))
    with pytest.raises(UserError, match="config.json: no such file; give a folder that"):
        tool.load_encoder(tmp_path, from_scratch=False, seed=1)
    with pytest.raises(UserError, match="--layer is 9, but the model has"):
        tool.main(tool.Options(str(export_folder), tasks, str(tmp_path / "out"), layer=9))
    with pytest.raises(UserError, match="holds 'README.md'"):
        tool.main(tool.Options(str(export_folder), tasks, str(export_folder)))
