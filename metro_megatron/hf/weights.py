"""The trainer's tensors under the names and in the form that `modeling_metro` has.

Legend: H hidden, F inner width, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.hf.modeling_metro import tied_weights

KINDS = ("weight", "bias")
NORMS = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "output_norm"}
"""megatron-core's names; post-LN uses both behind their sublayers."""
PARTS = ("word", "position", "norm")
"""Of an embedding."""
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
    tied = tied_weights(model_config.shared_embeddings, model_config.shared_lm_bias)
    return result | {name: result[source] for name, source in tied.items()}


def _convert(tensor: Tensor, origin: Origin, model_config: ModelConfig) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are cut; linear_qkv is taken apart.

    Its rows are q, k, v (K rows each) of head 0, then of head 1, and so on.
    """
    if "{part}" not in origin.target:
        is_vocabulary = origin.target.endswith(("word_embeddings.weight", "decoder.bias"))
        return {origin.target: tensor[: model_config.vocab_size] if is_vocabulary else tensor}
    parts = tensor.unflatten(0, (model_config.num_attention_heads, 3, -1)).unbind(1)
    names = ("query", "key", "value")
    return {origin.target.format(part=name): part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def _origins(model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    hidden, padded = model_config.hidden_size, model_config.padded_vocab_size
    shared = model_config.shared_parts
    of_main = {part: "tied" if part in ("word", *shared) else "main.embedding" for part in PARTS}
    yield from _embedding(of_main, "metro", model_config)
    yield from _embedding({part: "aux.embedding" for part in PARTS if part not in shared}, "auxiliary", model_config)
    yield from _positions("tied.main_table", "metro.encoder", model_config)
    yield from _positions("aux.table", "auxiliary.encoder", model_config)
    if "decoder" in shared:
        yield "tied.decoder.bias", Origin((padded,), "clm_head.decoder.bias")
    else:
        yield "aux.head.decoder.bias", Origin((padded,), "auxiliary_head.decoder.bias")
        yield "main.clm_head.decoder.bias", Origin((padded,), "clm_head.decoder.bias")
    yield from _linear("aux.head.dense", "auxiliary_head.dense", hidden, hidden)
    yield from _norm("aux.head.norm", "auxiliary_head.norm", hidden)
    yield from _linear("main.rtd_head", "rtd_head", 1, hidden)
    for there, here in ENCODERS.items():
        for i in range(model_config.num_layers if there == "main" else model_config.auxiliary_num_layers):
            yield from _layer(
                f"{there}.block.layers.{i}", f"{here}.encoder.layer.{i}", hidden, model_config.ffn_hidden_size
            )
        if model_config.norm_first:
            yield from _norm(f"{there}.block.final_layernorm", f"{here}.encoder.last_norm", hidden)


def _embedding(homes: Mapping[str, str], here: str, model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    """homes: the trainer's module that has each part. What both encoders share is main's in the exported model."""
    hidden, here = model_config.hidden_size, f"{here}.embeddings"
    if "word" in homes:
        shape = (model_config.padded_vocab_size, hidden)
        yield f"{homes['word']}.word.weight", Origin(shape, f"{here}.word_embeddings.weight")
    if "position" in homes and not model_config.untied_positions:
        shape = (model_config.max_position_embeddings, hidden)
        yield f"{homes['position']}.position.weight", Origin(shape, f"{here}.position_embeddings.weight")
    if "norm" in homes:
        yield from _norm(f"{homes['norm']}.norm", f"{here}.norm", hidden)


def _positions(there: str, here: str, model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    scheme, hidden = model_config.position_scheme, model_config.hidden_size
    if scheme.buckets is not None:
        shape = (scheme.num_rows, model_config.num_attention_heads)
        yield f"{there}.weight", Origin(shape, f"{here}.relative_attention_bias.weight")
    if scheme.is_untied:
        there, here = f"{there}.untied", f"{here}.untied_positions"
        shape = (scheme.positions + scheme.resets_cls, hidden)
        yield f"{there}.position.weight", Origin(shape, f"{here}.position_embeddings.weight")
        yield from _norm(f"{there}.norm", f"{here}.norm", hidden)
        for name in ("query", "key"):
            yield from _linear(f"{there}.{name}", f"{here}.{name}", hidden, hidden)


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
