"""The trainer's tensors under the names and in the form that `modeling_metro` has, and the way back: one table of both.

Legend: H hidden, D width of the token table, F inner width, N heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.position import PositionScheme
from metro_megatron.config.schema import EncoderSizes, ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.hf.heads_metro import tied_weights
from metro_megatron.hf.stored import LazyTensors

KINDS = ("weight", "bias")
QKV = ("query", "key", "value")
NORMS = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "output_norm"}
"""megatron-core's names; post-LN uses both behind their sublayers."""
PARTS = ("word", "position", "norm")
"""Of an embedding."""
METRO = ("rtd", "clm")
DECODERS = ("clm", "cloze", "mlm")
"""Objectives whose head is the tied decoder."""
WORDS = "embeddings.word_embeddings.weight"
VOCABULARY = ("word_embeddings.weight", "decoder.weight", "decoder.bias")
"""How names of exported tensors end that have a row per token."""
MISFIT = "weights and configuration do not belong together; give another checkpoint, or another copy of the folder"
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
    problems = _other_names(tensors, origins)
    result: dict[str, Tensor] = {}
    for name, origin in origins.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        misfit = _other_shape(name, tensor, origin.shape)
        problems += misfit
        if not misfit and not origin.target.startswith(LEFT_BEHIND):
            result |= _convert(tensor.float(), origin, model_config)
    if problems:
        raise UserError([*problems, MISFIT])
    return result | {name: result[source] for name, source in _ties(model_config, objectives).items()}


def hf_tensors(tensors: Mapping[str, Tensor], model_config: ModelConfig, objectives: Collection[str]) -> LazyTensors:
    """`hf_state_dict` without what is tied, of tensors that are read when asked for; with the heads left behind.

    Raises UserError naming every tensor that is missing or superfluous; where one is read, if its shape is another or
    it is not finite.
    """
    origins = dict(_origins(model_config, objectives))
    problems = _other_names(tensors, origins)
    if problems:
        raise UserError([*problems, MISFIT])
    last: tuple[str, dict[str, Tensor]] = ("", {})  # query, key and value are asked for one after the other

    def make(there: str, origin: Origin, target: str) -> Tensor:
        nonlocal last
        if last[0] != there:
            last = there, _convert(_checked(there, tensors[there], origin.shape), origin, model_config)
        return last[1][target]

    return LazyTensors(
        {target: partial(make, name, origin, target) for name, origin in origins.items() for target in _targets(origin)}
    )


def all_ties(model_config: ModelConfig, objectives: Collection[str]) -> dict[str, str]:
    """Other names of tensors, by which models of others may have them: the auxiliary's token table, too."""
    found = _ties(model_config, objectives)
    if model_config.auxiliary_num_layers and "word" in model_config.shared_parts:
        found[f"auxiliary.{WORDS}"] = f"metro.{WORDS}"
    return found


class TrainerTensors(Mapping[str, Tensor]):
    """The inverse of `hf_state_dict`: whole tensors by the trainer's global names, made when asked for, in fp32.

    exported: tensors by the names of `MetroForPreTraining`, and `scl_head`; those of what the configuration ties may
    stand there under any of their names. Its mapping has what exported is enough for.
    """

    def __init__(self, exported: Mapping[str, Tensor], model_config: ModelConfig, objectives: Collection[str]):
        self._exported, self._model_config = exported, model_config
        self.origins = dict(_origins(model_config, objectives))
        """All that the model has."""
        self._tied: dict[str, list[str]] = {}
        for name, source in all_ties(model_config, objectives).items():
            self._tied.setdefault(source, []).append(name)

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError where a tensor is of another shape than the configuration gives, or not finite."""
        origin = self.origins[name]
        shape, names = _target_shape(origin, self._model_config), [self._held_by(one)[0] for one in _targets(origin)]
        parts = [_checked(one, self._exported[one], shape) for one in names]
        return _join(parts, origin, self._model_config)

    def __contains__(self, name: object) -> bool:
        return name in self.origins and all(map(self._held_by, _targets(self.origins[str(name)])))

    def __iter__(self) -> Iterator[str]:
        return filter(self.__contains__, self.origins)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def unequal_ties(self) -> Iterator[tuple[str, str]]:
        """Two names in exported of one tensor here that have other values."""
        for origin in self.origins.values():
            for target in _targets(origin):
                first, *others = self._held_by(target) or [target]
                yield from ((first, name) for name in others if not _equal(self._exported[first], self._exported[name]))

    @property
    def unread(self) -> list[str]:
        """Names in exported of which nothing here is made."""
        targets = [target for origin in self.origins.values() for target in _targets(origin)]
        read = {name for target in targets for name in self._held_by(target)}
        return [name for name in self._exported if name not in read]

    def _held_by(self, target: str) -> list[str]:
        """Names in exported of the tensor that is `target`."""
        return [name for name in (target, *self._tied.get(target, ())) if name in self._exported]


def _other_names(tensors: Mapping[str, Tensor], origins: Mapping[str, Origin]) -> list[str]:
    missing = [f"tensor {name} is missing" for name in origins if name not in tensors]
    return missing + [f"tensor {name} is not part of this model" for name in tensors if name not in origins]


def _other_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    is_other = tuple(tensor.shape) != shape
    return [f"tensor {name} has shape {tuple(tensor.shape)}, the configuration gives {shape}"] if is_other else []


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In fp32. Raises UserError for another shape, and for values that no model can go on with."""
    problems = _other_shape(name, tensor, shape)
    if problems:
        raise UserError([*problems, MISFIT])
    num_bad = int((~tensor.isfinite()).sum())
    if num_bad:
        raise UserError(f"tensor {name}: {num_bad:,} of its values are no finite numbers; give another copy, or model")
    return tensor.float()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same values, those that are no numbers, which equal nothing, in the same places."""
    return one.shape == other.shape and one.allclose(other, rtol=0, atol=0, equal_nan=True)


def _ties(model_config: ModelConfig, objectives: Collection[str]) -> dict[str, str]:
    heads = [*(["auxiliary"] if model_config.auxiliary_num_layers else []), *(set(DECODERS) & set(objectives))]
    return tied_weights(model_config.shared_embeddings, model_config.shared_lm_bias, heads)


def _targets(origin: Origin) -> list[str]:
    return [origin.target.format(part=part) for part in QKV] if "{part}" in origin.target else [origin.target]


def _convert(tensor: Tensor, origin: Origin, model_config: ModelConfig) -> dict[str, Tensor]:
    """Rows that only pad the vocabulary are cut; linear_qkv is taken apart.

    Its rows are q, k, v (K rows each) of head 0, then of head 1, and so on.
    """
    if "{part}" not in origin.target:
        return {origin.target: tensor[: model_config.vocab_size] if _is_vocabulary(origin) else tensor}
    parts = tensor.unflatten(0, (_num_heads(origin, model_config), 3, -1)).unbind(1)
    return dict(zip(_targets(origin), (part.flatten(0, 1) for part in parts), strict=True))


def _join(parts: list[Tensor], origin: Origin, model_config: ModelConfig) -> Tensor:
    """The inverse of `_convert`; rows that only pad the vocabulary are 0, as they start and stay."""
    if "{part}" in origin.target:
        heads = _num_heads(origin, model_config)
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
    (tensor,) = parts
    if not _is_vocabulary(origin):
        return tensor
    padding = model_config.padded_vocab_size - model_config.vocab_size
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, padding))


def _target_shape(origin: Origin, model_config: ModelConfig) -> tuple[int, ...]:
    rows, *rest = origin.shape
    if "{part}" in origin.target:
        rows //= len(QKV)
    return (model_config.vocab_size if _is_vocabulary(origin) else rows, *rest)


def _is_vocabulary(origin: Origin) -> bool:
    return origin.target.endswith(VOCABULARY)


def _num_heads(origin: Origin, model_config: ModelConfig) -> int:
    sizes = model_config.main if origin.target.startswith("metro.") else model_config.auxiliary
    return sizes.num_attention_heads


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
