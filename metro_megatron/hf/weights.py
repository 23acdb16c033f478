"""The trainer's tensors under the names and in the form that `modeling_metro` has.

Legend: H hidden, D width of the token table, F inner width, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from metro_megatron.config.position import PositionScheme
from metro_megatron.config.schema import EncoderSizes, ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.hf.heads_metro import tied_weights

KINDS = ("weight", "bias")
NORMS = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "output_norm"}
"""megatron-core's names; post-LN uses both behind their sublayers."""
PARTS = ("word", "position", "norm")
"""Of an embedding."""
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
    heads = [*(["auxiliary"] if model_config.auxiliary_num_layers else []), *(set(DECODERS) & set(objectives))]
    tied = tied_weights(model_config.shared_embeddings, model_config.shared_lm_bias, heads)
    return result | {name: result[source] for name, source in tied.items()}


def _convert(tensor: Tensor, origin: Origin, model_config: ModelConfig) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are cut; linear_qkv is taken apart.

    Its rows are q, k, v (K rows each) of head 0, then of head 1, and so on.
    """
    if origin.target.startswith(LEFT_BEHIND):
        return {}
    if "{part}" not in origin.target:
        is_vocabulary = origin.target.endswith(("word_embeddings.weight", "decoder.bias"))
        return {origin.target: tensor[: model_config.vocab_size] if is_vocabulary else tensor}
    sizes = model_config.main if origin.target.startswith("metro.") else model_config.auxiliary
    parts = tensor.unflatten(0, (sizes.num_attention_heads, 3, -1)).unbind(1)
    names = ("query", "key", "value")
    return {origin.target.format(part=name): part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def _origins(model_config: ModelConfig, objectives: Collection[str]) -> Iterator[tuple[str, Origin]]:
    main, auxiliary, shared = model_config.main, model_config.auxiliary, model_config.shared_parts
    width, padded = model_config.table_width, model_config.padded_vocab_size
    of_main = {part: "tied" if part in ("word", *shared) else "main.embedding" for part in PARTS}
    yield from _embedding(of_main, "metro", model_config)
    yield from _positions("tied.main_table", "metro.encoder", main, model_config.position_scheme)
    if "rtd" in objectives:
        yield from _linear("main.rtd_head", "rtd_head", 1, main.hidden_size)
        if model_config.rtd_head == "dense":
            yield from _linear("main.rtd_head.dense", "rtd_head.dense", main.hidden_size, main.hidden_size)
    for name in (name for name in DECODERS if name in objectives):
        owner = "tied" if "decoder" in shared else f"main.{name}_head"
        yield f"{owner}.decoder.bias", Origin((padded,), f"{name}_head.decoder.bias")
        if model_config.lm_head == "dense":
            yield from _dense(f"main.{name}_head", f"{name}_head", width, main.hidden_size)
    if "scl" in objectives:
        yield from _dense("main.scl_head", LEFT_BEHIND, main.hidden_size, main.hidden_size)
    encoders = [("main", "metro", main)]
    if auxiliary.num_layers:
        encoders.append(("aux", "auxiliary", auxiliary))
        of_auxiliary = {part: "aux.embedding" for part in PARTS if part not in shared}
        yield from _embedding(of_auxiliary, "auxiliary", model_config)
        yield from _positions("aux.table", "auxiliary.encoder", auxiliary, model_config.position_scheme)
        yield from _dense("aux.head", "auxiliary_head", width, auxiliary.hidden_size)
        if "decoder" not in shared:
            yield "aux.head.decoder.bias", Origin((padded,), "auxiliary_head.decoder.bias")
    for there, here, sizes in encoders:
        if width != sizes.hidden_size:
            projection = f"{here}.embeddings.projection"
            yield from _linear(f"{there}.embedding.projection", projection, sizes.hidden_size, width)
        for i in range(sizes.num_layers):
            yield from _layer(f"{there}.block.layers.{i}", f"{here}.encoder.layer.{i}", sizes)
        if model_config.norm_first:
            yield from _norm(f"{there}.block.final_layernorm", f"{here}.encoder.last_norm", sizes.hidden_size)


def _embedding(homes: Mapping[str, str], here: str, model_config: ModelConfig) -> Iterator[tuple[str, Origin]]:
    """homes: the trainer's module that has each part. What both encoders share is main's in the exported model."""
    width, here = model_config.table_width, f"{here}.embeddings"
    if "word" in homes:
        shape = (model_config.padded_vocab_size, width)
        yield f"{homes['word']}.word.weight", Origin(shape, f"{here}.word_embeddings.weight")
    if "position" in homes and not model_config.untied_positions:
        shape = (model_config.max_position_embeddings, width)
        yield f"{homes['position']}.position.weight", Origin(shape, f"{here}.position_embeddings.weight")
    if "norm" in homes:
        yield from _norm(f"{homes['norm']}.norm", f"{here}.norm", width)


def _positions(there: str, here: str, sizes: EncoderSizes, scheme: PositionScheme) -> Iterator[tuple[str, Origin]]:
    hidden = sizes.hidden_size
    if scheme.buckets is not None:
        shape = (scheme.num_rows, sizes.num_attention_heads)
        yield f"{there}.weight", Origin(shape, f"{here}.relative_attention_bias.weight")
    if scheme.is_untied:
        there, here = f"{there}.untied", f"{here}.untied_positions"
        shape = (scheme.positions + scheme.resets_cls, hidden)
        yield f"{there}.position.weight", Origin(shape, f"{here}.position_embeddings.weight")
        yield from _norm(f"{there}.norm", f"{here}.norm", hidden)
        for name in ("query", "key"):
            yield from _linear(f"{there}.{name}", f"{here}.{name}", hidden, hidden)


def _dense(there: str, here: str, width: int, hidden: int) -> Iterator[tuple[str, Origin]]:
    """What a language modelling head has before its decoder."""
    yield from _linear(f"{there}.dense", f"{here}.dense", width, hidden)
    yield from _norm(f"{there}.norm", f"{here}.norm", width)


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
