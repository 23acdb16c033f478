"""The trainer's tensors under the names and in the form that `modeling_metro` has.

Legend: H hidden, D width of the token table, F inner width, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from metro_megatron.config.schema import EncoderSizes, ModelConfig
from metro_megatron.errors import UserError

KINDS = ("weight", "bias")
NORMS = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "output_norm"}
"""Post-LN: megatron-core's names, used behind the sublayers."""
ENCODERS = {"main": "metro", "aux": "auxiliary"}


class Origin(NamedTuple):
    """What the trainer has: its shape, and the name of what becomes of it ({part}: query, key and value)."""

    shape: tuple[int, ...]
    target: str


def hf_state_dict(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of `MetroForPreTraining`, in fp32, from the trainer's whole tensors by global name.

    Raises UserError naming every tensor that is missing, superfluous or of another shape than model_config gives.
    """
    origins = dict(_origins(model_config))
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
    return result | {"clm_head.decoder.weight": word, "auxiliary_head.decoder.weight": word}


def _convert(tensor: Tensor, origin: Origin, model_config: ModelConfig) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are cut; linear_qkv is taken apart.

    Its rows are q, k, v (K rows each) of head 0, then of head 1, and so on.
    """
    if "{part}" not in origin.target:
        is_vocabulary = origin.target.endswith(("word_embeddings.weight", "decoder.bias"))
        return {origin.target: tensor[: model_config.vocab_size] if is_vocabulary else tensor}
    sizes = model_config.main if origin.target.startswith(ENCODERS["main"]) else model_config.auxiliary
    parts = tensor.unflatten(0, (sizes.num_attention_heads, 3, -1)).unbind(1)
    names = ("query", "key", "value")
    return {origin.target.format(part=name): part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def _origins(model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    main, auxiliary, width = model_config.main, model_config.auxiliary, model_config.table_width
    padded, rows = model_config.padded_vocab_size, model_config.position_scheme.num_rows
    yield "tied.word.weight", Origin((padded, width), "metro.embeddings.word_embeddings.weight")
    for there, here, sizes in (("tied.main_table", "metro", main), ("aux.table", "auxiliary", auxiliary)):
        table = Origin((rows, sizes.num_attention_heads), f"{here}.encoder.relative_attention_bias.weight")
        yield f"{there}.weight", table
    yield from _language_model("aux.head", "auxiliary_head", auxiliary.hidden_size, model_config, is_dense=True)
    is_dense = model_config.lm_head == "dense"
    yield from _language_model("main.clm_head", "clm_head", main.hidden_size, model_config, is_dense)
    yield from _linear("main.rtd_head", "rtd_head", 1, main.hidden_size)
    if model_config.rtd_head == "dense":
        yield from _linear("main.rtd_head.dense", "rtd_head.dense", main.hidden_size, main.hidden_size)
    for there, here in ENCODERS.items():
        yield from _encoder(there, here, main if there == "main" else auxiliary, model_config)


def _language_model(
    there: str, here: str, hidden: int, model_config: ModelConfig, is_dense: bool
) -> Iterator[tuple[str, Origin]]:
    yield f"{there}.decoder.bias", Origin((model_config.padded_vocab_size,), f"{here}.decoder.bias")
    if is_dense:
        yield from _linear(f"{there}.dense", f"{here}.dense", model_config.table_width, hidden)
        yield from _norm(f"{there}.norm", f"{here}.norm", model_config.table_width)


def _encoder(there: str, here: str, sizes: EncoderSizes, model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    width = model_config.table_width
    positions = Origin((model_config.max_position_embeddings, width), f"{here}.embeddings.position_embeddings.weight")
    yield f"{there}.embedding.position.weight", positions
    yield from _norm(f"{there}.embedding.norm", f"{here}.embeddings.norm", width)
    if width != sizes.hidden_size:
        yield from _linear(f"{there}.embedding.projection", f"{here}.embeddings.projection", sizes.hidden_size, width)
    for i in range(sizes.num_layers):
        yield from _layer(f"{there}.block.layers.{i}", f"{here}.encoder.layer.{i}", sizes)


def _layer(there: str, here: str, sizes: EncoderSizes) -> Iterator[tuple[str, Origin]]:
    hidden, inner = sizes.hidden_size, sizes.ffn_hidden_size
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
