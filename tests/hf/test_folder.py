"""Folders with a damaged or missing file: every tool that opens one says path, cause and remedy, and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.commands.evaluate import load_pair
from metro_megatron.commands.probe import load_encoder
from metro_megatron.errors import UserError
from metro_megatron.evaluate.ranking import open_scorer
from metro_megatron.finetune.models import build_model, read_config, read_tokenizer
from metro_megatron.hf.folder import folder_config, folder_tokenizer
from metro_megatron.hf.modeling_metro import MetroForSequenceClassification
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tests.finetune.encoders import write_encoder
from tools.citizen.citizen import Options, main


def fine_tuned(folder: Path) -> None:
    config = read_config(folder, {})
    read_tokenizer(folder, config, 0)
    build_model("sequence_classification", folder, config, False)


def scored(folder: Path) -> None:
    folder_tokenizer(folder, folder_config(folder))  # before weights, which an encoder of transformers has no heads of
    open_scorer(folder)


def probed(folder: Path) -> None:
    Tokenizer.from_folder(folder)
    load_encoder(folder, from_scratch=False, seed=1)


def evaluated(folder: Path) -> None:
    load_pair(folder)
    Tokenizer.from_folder(folder)


def checked(folder: Path) -> None:
    main(Options(model=str(folder), only="AutoConfig"))


TOOLS: tuple[Callable[[Path], None], ...] = (scored, fine_tuned, probed, evaluated, checked)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def another_form(path: Path) -> None:
    path.write_text("[1]")


HARMS: tuple[Callable[[Path], None], ...] = (cut, garbled, another_form, Path.unlink)
FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors")
BY_MODEL_FILE = {"tokenizer.json", "tokenizer_config.json"}
"""What tools that read tokenizer.model alone need not look into."""


@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_by_every_tool(export_folder: Path, tmp_path: Path, file: str) -> None:
    for harm in HARMS:
        folder = shutil.copytree(export_folder, tmp_path / harm.__name__)
        harm(folder / file)
        for tool in TOOLS:
            if harm is Path.unlink and file == "tokenizer.model":
                continue  # tokenizer.json says all
            if tool in (probed, evaluated) and file in BY_MODEL_FILE and harm is not Path.unlink:
                continue
            with pytest.raises(UserError) as caught:
                tool(folder)
                pytest.fail(f"{harm.__name__} {tool.__name__}")
            (problem,) = caught.value.problems
            assert str(folder) in problem and "; " in problem and len(problem) < 600, (harm.__name__, tool.__name__)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_damage_in_folders_of_transformers(tmp_path: Path, kind: str) -> None:
    whole = write_encoder(kind, tmp_path / "whole")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        for harm in HARMS:
            folder = shutil.copytree(whole, tmp_path / f"{file}_{harm.__name__}")
            harm(folder / file)
            for tool in (fine_tuned,) if file == "model.safetensors" else (scored, fine_tuned):
                if harm is Path.unlink and file == "tokenizer.json":
                    continue  # some classes make one of other files
                with pytest.raises(UserError, match=str(folder)):
                    tool(folder)


def test_values_that_a_configuration_refuses(export_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export_folder, tmp_path / "other")
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_attention_heads": 5}))
    for tool in TOOLS:
        with pytest.raises(UserError, match=r"config.json: transformers cannot read it \(hidden_size 24 is not"):
            tool(folder)


def test_a_fine_tuned_folder_is_no_pair(export_folder: Path, tmp_path: Path) -> None:
    MetroForSequenceClassification.from_pretrained(export_folder).save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"\d+ weights of MetroForPreTraining are missing .*as it was pretrained"):
        load_pair(tmp_path / "tuned")
    whole = write_encoder("bert", tmp_path / "bert")
    for tool in (evaluated, checked):
        with pytest.raises(UserError, match="is a model of type 'bert'; give a folder that tools/convert"):
            tool(whole)
