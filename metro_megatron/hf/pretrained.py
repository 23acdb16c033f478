"""A pretrained pair, or one model of it, from a folder: its tensors by the names of `MetroForPreTraining`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import model_config_of
from metro_megatron.hf.folder import exported_config
from metro_megatron.hf.stored import LazyTensors, stored_tensors
from metro_megatron.hf.weights import DECODERS, all_ties

LEFT_OPEN = (
    *("hidden_dropout", "attention_dropout", "auxiliary_dropout"),
    *("init_method_std", "relative_bias_init", "position_init", "scaled_init_targets"),
    *("shared_embeddings", "shared_lm_bias"),
)
"""Fields of ModelConfig that another run may choose anew: how it trains, how weights start, and what is shared, as
long as nothing becomes one that has two values."""


@dataclass(frozen=True)
class Pretrained:
    """Weights of others, read when asked for."""

    path: Path
    tensors: LazyTensors
    """By the names of `MetroForPreTraining`, as `TrainerTensors` takes them."""
    architecture: Mapping[str, Any]
    """Options of ModelConfig that a run must have for these weights to mean the same, as `architecture` gives them."""
    tokenizer: Path | None
    """Folder of the tokenizer whose ids these are; None: `vocabulary` says it."""
    vocabulary: Sequence[str] = ()
    """Token of every row of the vocabulary, where there is no tokenizer."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are others', and the names of these, which stand in the files once."""
    unread: Sequence[str] = ()
    """Names in the files of which `tensors` has nothing."""
    segments: Mapping[str, Tensor] = field(default_factory=dict)
    """Of an ELECTRA what `hf.electra.segments_of` needs to have its segments again."""


def architecture(model_config: ModelConfig, objectives: Collection[str]) -> dict[str, Any]:
    """What decides tensors and computation, by option; of no part that is not there."""
    names = [one.name for one in fields(ModelConfig) if one.name not in LEFT_OPEN]
    found = {name: getattr(model_config, name) for name in names if not name.startswith("auxiliary_")}
    found["embedding_size"] = model_config.table_width
    if model_config.relative_bucket == "none":
        del found["relative_attention_num_buckets"], found["relative_attention_max_distance"]
    if "rtd" not in objectives:
        del found["rtd_head"]
    if not set(DECODERS) & set(objectives):
        del found["lm_head"]
    auxiliary = vars(model_config.auxiliary) if model_config.auxiliary_num_layers else {}
    return found | {f"auxiliary_{name}": value for name, value in auxiliary.items()}


def open_exported(folder: Path) -> Pretrained:
    """One that tools/convert_checkpoint.py or save_pretrained of our classes wrote. Raises UserError for another."""
    config = exported_config(folder)
    model_config = model_config_of(config)
    return Pretrained(
        folder,
        LazyTensors({_name_in_pair(name): make for name, make in stored_tensors(folder).makers.items()}),
        architecture(model_config, config.objectives),
        folder,
        aliases=all_ties(model_config, config.objectives),
    )


def _name_in_pair(name: str) -> str:
    """`MetroModel` saves the main encoder without the prefix that it has inside of other classes."""
    return f"metro.{name}" if name.startswith(("embeddings.", "encoder.")) else name
