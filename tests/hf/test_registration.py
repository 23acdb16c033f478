"""`import metro_megatron` and transformers, in either order, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from metro_megatron.hf import modeling_metro
from metro_megatron.hf.configuration_metro import MODELS, MetroConfig

ROOT = Path(__file__).parents[2]


def said(code: str) -> str:
    """What a process without a terminal prints."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


def test_an_import_loads_neither_transformers_nor_torch() -> None:
    loaded = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert said(f"import sys, metro_megatron; print({loaded})") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import metro_megatron; from transformers import BertModel, AutoModel",
        pytest.param("import metro_megatron; from transformers import AutoModel", marks=pytest.mark.long),
        pytest.param("from transformers import AutoModel; import metro_megatron", marks=pytest.mark.long),
        "from metro_megatron.hf import heads_metro, encoder_metro; from transformers import AutoModel",
        pytest.param(
            "from metro_megatron.hf import modeling_metro; from transformers import AutoModel", marks=pytest.mark.long
        ),
    ],
)
def test_folders_load_without_a_prompt_in_any_order(imports: str, export_folder: Path) -> None:
    found = said(f"{imports}\nprint(type(AutoModel.from_pretrained({str(export_folder)!r})).__module__)")
    assert found == "metro_megatron.hf.modeling_metro"


def test_what_was_saved_decides_between_two_classes_of_an_auto_class(export_folder: Path, tmp_path: Path) -> None:
    for name, auto in (
        ("MetroForAuxiliaryMaskedLM", transformers.AutoModelForMaskedLM),
        ("MetroForReplacedTokenDetection", transformers.AutoModelForPreTraining),
    ):
        kind = getattr(modeling_metro, name)
        model = kind.from_pretrained(export_folder)
        model.save_pretrained(tmp_path / name)
        assert type(auto.from_pretrained(export_folder)) is not kind
        again = auto.from_pretrained(tmp_path / name)
        assert type(again) is kind
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_auto_classes_of_two_make_the_first_of_a_fresh_configuration() -> None:
    with torch.device("meta"):
        for auto in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
            for config in (MetroConfig(), MetroConfig(architectures=None)):
                model = getattr(transformers, auto).from_config(config)
                assert type(model).__name__ == MODELS[auto]


def test_nothing_that_imports_go_through_loses_the_classes() -> None:
    """A look for a module that loads nothing, a failure, several threads, a reload."""
    code = """
import importlib.util, sys, threading
import metro_megatron

CONFIG, MODELS = (f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling"))
LAYERS = "transformers.modeling_layers"

def known():
    assert sys.modules[CONFIG].AutoConfig.for_model("metro").model_type == "metro"
    return [kind.__name__ for kind in sys.modules[MODELS].AutoModel._model_mapping._extra_content.values()]

finders = [*sys.meta_path]
assert importlib.util.find_spec(CONFIG) and importlib.util.find_spec(MODELS)
sys.modules[LAYERS] = None
try:
    importlib.import_module(MODELS)
except ImportError:
    del sys.modules[LAYERS]
assert MODELS not in sys.modules
threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in (MODELS, CONFIG) * 2]
[thread.start() for thread in threads], [thread.join() for thread in threads]
found = [known()]
for name in (CONFIG, MODELS):
    importlib.reload(sys.modules[name])
found += [known()]
assert finders == [finder for finder in sys.meta_path if finder in finders]
print(found)
"""
    assert said(code) == "[['MetroModel'], ['MetroModel']]"


def test_transformers_4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start tied decoders at random, and warn."""
    monkeypatch.setattr(modeling_metro.transformers, "__version__", "4.57.3")
    with pytest.raises(ImportError, match=r"need transformers 5, this is 4\.57\.3"):
        modeling_metro.MetroModel(MetroConfig())


def test_a_configuration_from_a_hub_names_the_code_beside_it() -> None:
    """transformers writes the repository before what it loaded from there."""
    config = MetroConfig(auto_map={"AutoModel": "someone/model--modeling_metro.MetroModel"}, objectives=["mlm"])
    assert config.auto_map["AutoModel"] == "modeling_metro.MetroModel"
    assert config.auto_map["AutoModelForMaskedLM"] == "modeling_metro.MetroForMaskedLM"
    assert "MetroForReplacedTokenDetection" not in config.auto_map
