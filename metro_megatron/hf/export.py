"""A folder for transformers from the trainer's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
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
from metro_megatron.hf.weights import METRO, hf_state_dict
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer
from metro_megatron.vocabulary import BOS_ID, EOS_ID, MASK_ID, PAD_ID

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


def metro_config(model_config: ModelConfig, objectives: Collection[str] = METRO) -> MetroConfig:
    """The transformers configuration of a model configuration whose main encoder learns objectives."""
    return MetroConfig(
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        num_hidden_layers=model_config.num_layers,
        num_auxiliary_layers=model_config.auxiliary_num_layers,
        num_attention_heads=model_config.num_attention_heads,
        intermediate_size=model_config.ffn_hidden_size,
        embedding_size=model_config.embedding_size,
        auxiliary_hidden_size=model_config.auxiliary_hidden_size,
        auxiliary_num_attention_heads=model_config.auxiliary_num_attention_heads,
        auxiliary_ffn_hidden_size=model_config.auxiliary_ffn_hidden_size,
        rtd_head=model_config.rtd_head,
        lm_head=model_config.lm_head,
        max_position_embeddings=model_config.max_position_embeddings,
        relative_attention_num_buckets=model_config.relative_attention_num_buckets,
        relative_attention_max_distance=model_config.relative_attention_max_distance,
        relative_bucket=model_config.relative_bucket,
        untied_positions=model_config.untied_positions,
        reset_cls=model_config.reset_cls,
        norm_first=model_config.norm_first,
        shared_embeddings=model_config.shared_embeddings,
        shared_lm_bias=model_config.shared_lm_bias,
        layer_norm_eps=model_config.layer_norm_eps,
        hidden_dropout_prob=model_config.hidden_dropout,
        attention_probs_dropout_prob=model_config.attention_dropout,
        initializer_range=model_config.init_method_std,
        scaled_init_targets=model_config.scaled_init_targets,
        relative_bias_init=model_config.relative_bias_init,
        position_init=model_config.position_init,
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        mask_token_id=MASK_ID,
        objectives=list(objectives),
    )


def exported_tensors(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Those of a run that an export keeps: a head with which main filled masks for itself serves nobody afterwards."""
    is_kept = config.corruption.trains_auxiliary
    return {name: tensor for name, tensor in tensors.items() if is_kept or not name.startswith("aux.")}


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
) -> None:
    """Write a folder that transformers' Auto classes load: weights, code, tokenizer, model card with facts.

    It appears as `output` when all is written and `verify` has accepted it (by not raising); the facts that verify
    returns join the card. An earlier export at `output` is replaced. Raises UserError if output holds anything
    else, or tensors or tokenizer do not fit the configuration; nothing is written then.
    """
    refuse_foreign(output, EXPORTED_FILES)
    vocab_size = Tokenizer.from_folder(tokenizer_folder).vocab_size
    if vocab_size != model_config.vocab_size:
        raise UserError(
            f"{tokenizer_folder} has {vocab_size} ids, the model {model_config.vocab_size}; use the run's tokenizer"
        )
    state = hf_state_dict(tensors, model_config, objectives)
    with whole_folder(output, EXPORTED_FILES) as folder:
        with torch.device("meta"):
            model = MetroForPreTraining(metro_config(model_config, objectives))
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        finish_folder(folder)
        _write_tokenizer(tokenizer_folder, folder, model_config.max_position_embeddings)
        facts = {**card, **(verify(folder) if verify else {})}
        (folder / "README.md").write_text(model_card(model_config, facts, objectives), encoding="utf-8")


def finish_folder(folder: Path) -> None:
    """Make weights as readable as config.json."""
    for path in folder.glob("model*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def _write_tokenizer(source: Path, target: Path, max_length: int) -> None:
    copy_tokenizer(source, target)
    path = target / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = max_length
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
