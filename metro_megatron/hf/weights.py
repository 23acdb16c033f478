"""The trainer's tensors under the names and in the form that `modeling_metro` has.

Legend: H hidden, F inner width, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.errors import UserError

KINDS = ("weight", "bias")
NORMS = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "output_norm"}
"""Post-LN: megatron-core's names, used behind the sublayers."""
ENCODERS = {"main": "metro", "aux": "auxiliary"}
METRO = ("rtd", "clm")
DECODERS = ("clm", "cloze", "mlm")
"""Objectives whose head is the tied decoder."""
LEFT_BEHIND = "scl_head"
"""A head that the trainer must have and no export gets: it serves the contrastive loss alone."""


class Origin(NamedTuple):
    """What the trainer has: its shape, and the name of what becomes of it ({part}: query, key and value)."""

    shape: tuple[int, ...]
    target: str


def hf_state_dict(
    tensors: Mapping[str, Tensor], model_config: ModelConfig, objectives: Collection[str] = METRO
) -> dict[str, Tensor]:
    """All tensors of `MetroForPreTraining`, in fp32, from the trainer's whole tensors by global name.

    objectives are those of `MetroConfig`; auxiliary_num_layers 0 means that there is no auxiliary. Raises UserError
    naming every tensor that is missing, superfluous or of another shape than these give.
    """
    origins = dict(_origins(model_config, objectives))
    problems = [f"tensor {name} is missing" for name in origins if name not in tensors]
    problems += [f"tensor {name} is not part of this model" for name in tensors if name not in origins]
    result: dict[str, Tensor] = {}
    for name, origin in origins.items():
        if name not in tensors:
            continue
        if tuple(tensors[name].shape) != origin.shape:
            shape = tuple(tensors[name].shape)
            problems.append(f"tensor {name} has shape {shape}, the configuration gives {origin.shape}")
            continue
        result |= _convert(tensors[name].float(), origin, model_config)
    if problems:
        raise UserError([*problems, "checkpoint and configuration do not belong together; give another checkpoint"])
    word = result["metro.embeddings.word_embeddings.weight"]
    decoders = [name.removesuffix("bias") for name in result if name.endswith("decoder.bias")]
    return result | {f"{decoder}weight": word for decoder in decoders}


def _convert(tensor: Tensor, origin: Origin, model_config: ModelConfig) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are cut; linear_qkv is taken apart.

    Its rows are q, k, v (K rows each) of head 0, then of head 1, and so on.
    """
    if origin.target.startswith(LEFT_BEHIND):
        return {}
    if "{part}" not in origin.target:
        is_vocabulary = origin.target.endswith(("word_embeddings.weight", "decoder.bias"))
        return {origin.target: tensor[: model_config.vocab_size] if is_vocabulary else tensor}
    parts = tensor.unflatten(0, (model_config.num_attention_heads, 3, -1)).unbind(1)
    names = ("query", "key", "value")
    return {origin.target.format(part=name): part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def _origins(model_config: ModelConfig, objectives: Collection[str]) -> Iterator[tuple[str, Origin]]:
    hidden, padded = model_config.hidden_size, model_config.padded_vocab_size
    table = (model_config.position_scheme.num_rows, model_config.num_attention_heads)
    yield "tied.word.weight", Origin((padded, hidden), "metro.embeddings.word_embeddings.weight")
    yield "tied.main_table.weight", Origin(table, "metro.encoder.relative_attention_bias.weight")
    depths = {"main": model_config.num_layers}
    if model_config.auxiliary_num_layers:
        depths["aux"] = model_config.auxiliary_num_layers
        yield "aux.table.weight", Origin(table, "auxiliary.encoder.relative_attention_bias.weight")
        yield "aux.head.decoder.bias", Origin((padded,), "auxiliary_head.decoder.bias")
        yield from _linear("aux.head.dense", "auxiliary_head.dense", hidden, hidden)
        yield from _norm("aux.head.norm", "auxiliary_head.norm", hidden)
    if "rtd" in objectives:
        yield from _linear("main.rtd_head", "rtd_head", 1, hidden)
    if "scl" in objectives:
        yield from _linear("main.scl_head.dense", f"{LEFT_BEHIND}.dense", hidden, hidden)
        yield from _norm("main.scl_head.norm", f"{LEFT_BEHIND}.norm", hidden)
    for name in DECODERS:
        if name in objectives:
            yield f"main.{name}_head.decoder.bias", Origin((padded,), f"{name}_head.decoder.bias")
    for there, depth in depths.items():
        here = ENCODERS[there]
        positions = Origin(
            (model_config.max_position_embeddings, hidden), f"{here}.embeddings.position_embeddings.weight"
        )
        yield f"{there}.embedding.position.weight", positions
        yield from _norm(f"{there}.embedding.norm", f"{here}.embeddings.norm", hidden)
        for i in range(depth):
            yield from _layer(
                f"{there}.block.layers.{i}", f"{here}.encoder.layer.{i}", hidden, model_config.ffn_hidden_size
            )


def _layer(there: str, here: str, hidden: int, inner: int) -> Iterator[tuple[str, Origin]]:
    yield from _linear(f"{there}.self_attention.linear_qkv", f"{here}.attention.{{part}}", 3 * hidden, hidden)
    yield from _linear(f"{there}.self_attention.linear_proj", f"{here}.attention.output", hidden, hidden)
    yield from _linear(f"{there}.mlp.linear_fc1", f"{here}.intermediate", inner, hidden)
    yield from _linear(f"{there}.mlp.linear_fc2", f"{here}.output", hidden, inner)
    for name, new_name in NORMS.items():
        yield from _norm(f"{there}.{name}", f"{here}.{new_name}", hidden)


def _linear(there: str, here: str, rows: int, columns: int) -> Iterator[tuple[str, Origin]]:
    yield f"{there}.weight", Origin((rows, columns), f"{here}.weight")
    yield f"{there}.bias", Origin((rows,), f"{here}.bias")


def _norm(there: str, here: str, size: int) -> Iterator[tuple[str, Origin]]:
    for kind in KINDS:
        yield f"{there}.{kind}", Origin((size,), f"{here}.{kind}")
