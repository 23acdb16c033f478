"""`make citizen`: checks that need transformers alone pass on a small folder, and see what is wrong with one."""

import ast
import inspect
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metro_megatron.errors import UserError
from metro_megatron.hf import modeling_metro
from metro_megatron.hf.positions_metro import MetroRowTurn
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from tests.tokenizer.others import write_other
from tools.citizen import stranger, subject
from tools.citizen.calls import CALLS
from tools.citizen.citizen import Options, main
from tools.citizen.loading import LOADING
from tools.citizen.losses import LOSSES
from tools.citizen.rows import ROWS
from tools.citizen.subject import Subject, Wrong

ELSEWHERE = (
    "torch.compile",  # half a minute
    *("import orders", "saved, moved, loaded; without the package"),  # processes: test_registration, test_heads_metro
    "AutoTokenizer, no prompt",  # other characters than the small tokenizer has
)
CHECKS = {name: check for checks in (LOADING, CALLS, ROWS, LOSSES) for name, check in checks.items()}


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ELSEWHERE])
def test_a_check_passes(name: str, export_folder: Path, tmp_path: Path) -> None:
    assert CHECKS[name](Subject(export_folder, tmp_path))


@pytest.mark.parametrize("module", [stranger, subject])
def test_the_stranger_loads_nothing_of_the_package_by_itself(module: ModuleType) -> None:
    """Else the package's hook would be there, and its modules not."""
    body = ast.parse(inspect.getsource(module)).body
    names = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    assert names and not any(name.startswith("metro_megatron") for name in names)


def test_no_check_of_a_name_is_an_error(export_folder: Path) -> None:
    with pytest.raises(UserError, match="--only typo: no check's name holds it; the checks are AutoTokenizer"):
        main(Options(model=str(export_folder), only="typo"))


def test_a_tokenizer_of_others_is_that_of_the_run(reviews: list[list[str]], tmp_path: Path) -> None:
    """BERT's, which lower cases: texts do not come back as they were."""
    write_other("wordpiece", (unit for one in reviews[:50] for unit in one), tmp_path / "theirs")
    copy_tokenizer(tmp_path / "theirs", tmp_path / "export")
    check = LOADING["AutoTokenizer, no prompt"]
    assert check(Subject(tmp_path / "export", tmp_path)).endswith(" ids, those of the run")
    path = tmp_path / "export" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("PreTrainedTokenizerFast", "RobertaTokenizerFast"))
    with pytest.raises(Wrong, match="the run's are"):
        check(Subject(tmp_path / "export", tmp_path))


def test_checks_see_faults(export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_stands(self: MetroRowTurn, x: Tensor) -> Tensor:
        return x

    def of_all(labels: Tensor, logits: Tensor, config: object, **kwargs: object) -> Tensor:
        return torch.nn.functional.mse_loss(logits.mean(-1), labels.float().view(len(labels), -1).mean(-1))

    subject = Subject(export_folder, tmp_path)
    pickled = Subject(shutil.copytree(export_folder, tmp_path / "bin"), tmp_path)
    torch.save(load_file(pickled.folder / "model.safetensors"), pickled.folder / "pytorch_model.bin")
    (pickled.folder / "model.safetensors").unlink()
    with pytest.raises(Wrong, match="no tensors in"):
        LOADING["imported again"](pickled)
    monkeypatch.setattr(MetroRowTurn, "turn", as_it_stands)
    monkeypatch.setattr(MetroRowTurn, "turn_back", as_it_stands)
    with pytest.raises(Wrong, match="expected no difference"):
        ROWS["padding on the left"](subject)
    monkeypatch.setattr(modeling_metro.MetroForSequenceClassification, "loss_function", staticmethod(of_all))
    with pytest.raises(Wrong, match="allowed 1e-05"):
        LOSSES["losses of classification"](subject)
    monkeypatch.setattr(modeling_metro, "check_labels", lambda *arguments: None)
    with pytest.raises((IndexError, Wrong)):
        LOSSES["labels out of range"](subject)
