"""One who has the folder and not this package: everything loads by the folder's own code, without network or prompt.

Runs as a process of its own, `python -m tools.citizen.stranger FOLDER SAVED IDS OUTPUT`: SAVED holds folders that
`save_pretrained` of each class made, by class; IDS are token ids [B, S]; OUTPUT gets {what: `answer`}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tools.citizen.subject import answer


class NoPackage:
    """An import of the package fails, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "metro_megatron":
            raise ModuleNotFoundError(f"no module named {name}, as far as this process is concerned")


def loaded(folder: Path, name: str) -> Any:
    """By an Auto class, or by the name of a class that only the auto map knows."""
    torch.manual_seed(0)
    if hasattr(transformers, name):
        return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    target = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"][name]
    return get_class_from_dynamic_module(target, folder).from_pretrained(folder).eval()


def answers(folder: Path, saved: Path, input_ids: Tensor) -> dict[str, Tensor]:
    """Of all that config.json's auto map names (of fresh heads' encoders), and of every saved class."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    found = {}
    for name in sorted(set(auto_map) - {"AutoConfig"}):
        model = loaded(folder, name)
        pretrained = "LM" in name or name in ("AutoModelForPreTraining", "MetroForReplacedTokenDetection")
        found[name] = answer(model if pretrained else model.base_model, input_ids)
    for path in sorted(saved.iterdir()):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = next(auto for auto, target in config["auto_map"].items() if target.endswith(f".{path.name}"))
        found[f"saved {path.name}"] = answer(loaded(path, name), input_ids)
    return found


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage())  # type: ignore[arg-type]
    folder, saved, ids, output = map(Path, sys.argv[1:])
    torch.save(answers(folder, saved, torch.load(ids)), output)
