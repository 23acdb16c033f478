"""A folder for transformers from the trainer's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_megatron.config.schema import Config, ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.hf.card import model_card
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.stored import LazyTensors, write_weights
from metro_megatron.hf.weights import METRO, hf_tensors
from metro_megatron.tokenizer.tokenizer import MODEL_FILE, TOKENIZER_FILES, Tokenizer, copy_tokenizer
from metro_megatron.tokenizer.tokenizer_json import write_folder
from metro_megatron.tokenizer.trained import TrainedTokenizer

CODE_FILES = ("configuration_metro.py", "positions_metro.py", "encoder_metro.py", "heads_metro.py", "modeling_metro.py")

EXPORTED_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    *TOKENIZER_FILES,
    *CODE_FILES,
    "__pycache__",
)
"""Patterns of all that an export may hold."""
MARK = "modeling_metro.py"
"""What every export has, and no folder of another model."""


RENAMED = {
    "num_layers": "num_hidden_layers",
    "auxiliary_num_layers": "num_auxiliary_layers",
    "ffn_hidden_size": "intermediate_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_method_std": "initializer_range",
}
"""Names that MetroConfig has for fields of ModelConfig; the others are the same in both."""
WITHOUT_COUNTERPART = ("auxiliary_dropout",)
"""Fields of ModelConfig that say nothing of an exported model, whose auxiliary has no dropout."""


def metro_config(model_config: ModelConfig, objectives: Collection[str] = METRO, **options: float) -> MetroConfig:
    """The transformers configuration of a model configuration whose main encoder learns objectives.

    options: those of `ObjectiveConfig` that MetroConfig has, too.
    """
    model: dict[str, Any] = {theirs: getattr(model_config, ours) for ours, theirs in _both_names()}
    return MetroConfig(**model | options, objectives=list(objectives))


def model_config_of(config: MetroConfig) -> ModelConfig:
    """The model configuration of an exported folder; of 0 auxiliary layers where it has no auxiliary."""
    return ModelConfig(**{ours: getattr(config, theirs) for ours, theirs in _both_names()})


def _both_names() -> Iterator[tuple[str, str]]:
    names = (field.name for field in fields(ModelConfig) if field.name not in WITHOUT_COUNTERPART)
    return ((name, RENAMED.get(name, name)) for name in names)


def exported_tensors(readers: Mapping[str, Callable[[], Tensor]], config: Config) -> LazyTensors:
    """Those of a run that an export keeps: a head with which main filled masks for itself serves nobody afterwards."""
    is_kept = config.corruption.trains_auxiliary
    return LazyTensors({name: read for name, read in readers.items() if is_kept or not name.startswith("aux.")})


def exported_model(config: Config) -> ModelConfig:
    """The run's model; of no auxiliary layers where the run trained none."""
    return config.model if config.corruption.trains_auxiliary else replace(config.model, auxiliary_num_layers=0)


def write_hf_folder(
    output: Path,
    tensors: Mapping[str, Tensor],
    model_config: ModelConfig,
    tokenizer_folder: Path,
    card: Mapping[str, object],
    verify: Callable[[Path], Mapping[str, object]] | None = None,
    objectives: Collection[str] = METRO,
    **options: float,
) -> None:
    """Write a folder that transformers' Auto classes load: weights, code, tokenizer, model card with facts.

    It appears as `output` when all is written and `verify` has accepted it (by not raising); the facts that verify
    returns join the card. options are those of `metro_config`. An earlier export at `output` is replaced. Raises
    UserError if output holds anything else, or tensors or tokenizer do not fit the configuration; nothing is written
    then.
    """
    refuse_foreign(output, EXPORTED_FILES, MARK)
    refuse_other_tokenizer(tokenizer_folder, model_config)
    exported = hf_tensors(tensors, model_config, objectives)
    with whole_folder(output, EXPORTED_FILES, MARK) as folder:
        with torch.device("meta"):
            model = MetroForPreTraining(metro_config(model_config, objectives, **options))
        model.save_pretrained(folder, state_dict={})  # all but weights
        write_weights(folder, exported, model)
        finish_folder(folder)
        write_tokenizer(tokenizer_folder, folder, model_config.max_position_embeddings)
        facts = {**card, **(verify(folder) if verify else {})}
        (folder / "README.md").write_text(model_card(model_config, facts, objectives), encoding="utf-8")


def refuse_other_tokenizer(folder: Path, model_config: ModelConfig) -> None:
    """Raise UserError unless a tokenizer has as many ids as the model."""
    vocab_size = Tokenizer.from_folder(folder).vocab_size
    if vocab_size != model_config.vocab_size:
        raise UserError(f"{folder} has {vocab_size} ids, the model {model_config.vocab_size}; use the run's tokenizer")


def finish_folder(folder: Path) -> None:
    """Make weights as readable as config.json."""
    for path in folder.glob("model*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def write_tokenizer(source: Path, target: Path, max_length: int) -> None:
    """Copy a tokenizer for a model of so many positions; tokenizer.json of one of ours is made anew from its model."""
    copy_tokenizer(source, target)
    if isinstance(Tokenizer.from_folder(target), TrainedTokenizer):
        write_folder((target / MODEL_FILE).read_bytes(), target)
    path = target / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = max_length
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
