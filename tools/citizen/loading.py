"""Checks of loading and saving: with the package, without it, everywhere, and again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from metro_megatron.hf import modeling_metro
from metro_megatron.hf.configuration_metro import MODELS, MetroConfig
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tools.citizen.subject import NUM_LABELS, Checks, Subject, Wrong, answer, close, equal, require

ROOT = Path(__file__).parents[2]
IMPORTS = (
    "import metro_megatron; from transformers import AutoModel",
    "from transformers import AutoModel; import metro_megatron",
    "import metro_megatron; from transformers import BertModel, AutoModel",
)


def tokenizer(subject: Subject) -> str:
    """AutoTokenizer, which asks nothing, and gives the run's ids; of ours, whose texts come back."""
    found, own = subject.tokenizer, Tokenizer.from_folder(subject.folder)
    text = "Naïve café, 北京 🙂"
    ids = [own.special_ids.bos, *own.encode(text), own.special_ids.eos]
    require(found(text)["input_ids"] == ids, f"gives {found(text)['input_ids']}, the run's are {ids}")
    if subject.has_own_tokenizer:
        require(found.decode(ids, skip_special_tokens=True).strip() == text, "the text is not kept")
    require(set(found(text)) == {"input_ids", "attention_mask"}, f"gives {set(found(text))}")
    return f"{len(found)} ids, those of the run"


def config(subject: Subject) -> str:
    """AutoConfig."""
    found = transformers.AutoConfig.from_pretrained(subject.folder)
    require(type(found) is MetroConfig, f"loads {type(found)}")
    return f"MetroConfig, {found.num_hidden_layers} layers of {found.hidden_size}"


def auto_class(name: str) -> Any:
    """The check of one Auto class: the package's class, and the file's weights in it."""

    def check(subject: Subject) -> str:
        model = subject.load(name)
        require(type(model) is getattr(modeling_metro, MODELS[name]), f"loads {type(model)}")
        stored = _stored(subject)
        prefix = "metro." if name == "AutoModel" else ""
        found = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
        same = [key for key in found if key in stored]
        require(len(same) > 0 and all(torch.equal(found[key], stored[key]) for key in same), "weights differ")
        fresh = {key.split(".")[0] for key in found if key not in stored and ".decoder." not in key}
        require(fresh <= {"classifier", "qa_outputs"}, f"starts {sorted(fresh)} at random")
        return f"{len(same)} tensors equal" + (f", {', '.join(fresh)} fresh" if fresh else "")

    return check


def by_name(subject: Subject) -> str:
    """Auxiliary and detector say what the whole pair says."""
    ids, pair = subject.rows()["input_ids"], subject.load("AutoModelForPreTraining")
    with torch.no_grad():
        whole = pair(ids, noised_input_ids=ids)
        for name, logits in (
            ("MetroForAuxiliaryMaskedLM", whole.mlm_logits),
            ("MetroForReplacedTokenDetection", whole.rtd_logits),
        ):
            part = getattr(modeling_metro, name).from_pretrained(subject.folder).eval()
            said = equal(part(ids).logits, logits)
    return f"as in the pair, {said}"


def import_orders(subject: Subject) -> str:
    """The package and transformers in either order, in processes without a terminal to answer prompts."""
    for line in IMPORTS:
        code = f"{line}\nprint(type(AutoModel.from_pretrained({str(subject.folder)!r})).__module__)"
        ran = _python(["-W", "ignore", "-c", code])
        if "metro_megatron.hf.modeling_metro" not in ran.stdout:
            raise Wrong(f"{line}: {ran.stderr.strip()[-300:]}")
    return f"{len(IMPORTS)} orders"


def from_config(subject: Subject) -> str:
    """A fresh model of the same shapes."""
    found = transformers.AutoModelForSequenceClassification.from_config(subject.classifier().config)
    expected = {name: tensor.shape for name, tensor in subject.classifier().state_dict().items()}
    require({name: tensor.shape for name, tensor in found.state_dict().items()} == expected, "shapes differ")
    return f"{len(expected)} tensors"


def meta_device(subject: Subject) -> str:
    """Built without memory, filled, and computing as the loaded one."""
    loaded = subject.load()
    with torch.device("meta"):
        built = transformers.AutoModel.from_config(loaded.config)
        shape = built(torch.zeros(2, 5, dtype=torch.long)).last_hidden_state.shape
    require(shape == (2, 5, loaded.config.hidden_size), f"shape {tuple(shape)} on the meta device")
    built.load_state_dict(loaded.state_dict(), assign=True)
    ids = subject.rows()["input_ids"]
    return close(answer(built.eval(), ids), answer(loaded, ids))


def saved_and_moved(subject: Subject) -> str:
    """Every class: saved, moved, loaded by its Auto class, here and by one without this package, offline."""
    ids, expected = subject.rows()["input_ids"], {}
    saved = subject.scratch / "saved"
    for auto, name in MODELS.items():
        kind = getattr(modeling_metro, name)
        torch.manual_seed(0)
        model = kind.from_pretrained(subject.folder, num_labels=NUM_LABELS).eval()
        model.save_pretrained(subject.scratch / "first")
        shutil.move(subject.scratch / "first", saved / name)
        expected[f"saved {name}"] = answer(model, ids)
        pretrained = "LM" in name or name in ("MetroForPreTraining", "MetroForReplacedTokenDetection")
        expected[auto] = answer(model if pretrained else model.base_model, ids)
        again = getattr(transformers, kind._auto_class).from_pretrained(saved / name)
        require(type(again) is kind, f"{saved / name} loads as {type(again)}")
        for key, tensor in again.state_dict().items():
            equal(tensor, model.state_dict()[key])
    torch.save(ids, subject.scratch / "ids.pt")
    arguments = [subject.folder, saved, subject.scratch / "ids.pt", subject.scratch / "answers.pt"]
    code = f"from tools.citizen.stranger import meet; meet(*{list(map(str, arguments))!r})"
    ran = _python(["-W", "ignore", "-c", code], HF_MODULES_CACHE=str(subject.scratch / "modules"))
    if ran.returncode:
        raise Wrong(ran.stderr.strip()[-300:])
    found = torch.load(subject.scratch / "answers.pt")
    require(found.keys() == expected.keys(), f"{sorted(found.keys() ^ expected.keys())} on one side only")
    said = [close(found[name], numbers) for name, numbers in expected.items()]
    return f"{len(MODELS)} classes; {len(found)} loads without the package, the last {said[-1]}"


def imported_again(subject: Subject) -> str:
    """The folder's tensors as the trainer has them, and exported once more: the same bits."""
    from metro_megatron.hf.export import model_config_of
    from metro_megatron.hf.pretrained import open_exported
    from metro_megatron.hf.weights import TrainerTensors, hf_state_dict

    config = MetroConfig.from_pretrained(subject.folder)
    model_config = model_config_of(config)
    tensors = TrainerTensors(open_exported(subject.folder).tensors, model_config, config.objectives)
    again = hf_state_dict(dict(tensors), model_config, config.objectives)
    stored = _stored(subject)
    require(len(stored) > 0, "no tensors in model*.safetensors")
    require(stored.keys() <= again.keys(), f"{sorted(stored.keys() - again.keys())} got lost")
    for name, tensor in stored.items():
        equal(again[name], tensor)
    return f"{len(tensors)} tensors of the trainer, {len(stored)} of the folder equal"


def _stored(subject: Subject) -> dict[str, Tensor]:
    """All tensors of the folder's files."""
    return {key: value for path in subject.folder.glob("*.safetensors") for key, value in load_file(path).items()}


def _python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter in the repository, offline."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


LOADING: Checks = {
    "AutoTokenizer, no prompt": tokenizer,
    "AutoConfig": config,
    **{name: auto_class(name) for name in MODELS if name.startswith("Auto")},
    "auxiliary and detector by name": by_name,
    "import orders": import_orders,
    "from_config": from_config,
    "meta device": meta_device,
    "saved, moved, loaded; without the package": saved_and_moved,
    "imported again": imported_again,
}
