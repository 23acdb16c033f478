"""Weights of a model of some positions as those of one of more: what train.initialize_positions asks for.

Legend: P positions, D width of a table, N heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.position import PositionScheme
from metro_megatron.config.schema import MorePositions
from metro_megatron.hf.pretrained import Pretrained
from metro_megatron.hf.stored import LazyTensors

POSITIONS = "max_position_embeddings"
ABSOLUTE = ".embeddings.position_embeddings.weight"
UNTIED = ".untied_positions.position_embeddings.weight"
RELATIVE = ".relative_attention_bias.weight"
"""How names of exported tensors end that have rows for positions or for buckets of distances."""


def with_more_positions(pretrained: Pretrained, scheme: PositionScheme, how: MorePositions) -> Pretrained:
    """The same for scheme.positions, from which its own scheme differs in having fewer; as it is where it has not.

    Position 0 is that of <s>, whose rows stay its own.
    """
    fewer = replace(scheme, positions=pretrained.architecture[POSITIONS])
    if fewer.positions >= scheme.positions:
        return pretrained

    def table(make: Callable[[], Tensor], own: int) -> Tensor:
        return more_rows(make(), scheme.positions - fewer.positions, own, how)

    def biases(make: Callable[[], Tensor]) -> Tensor:
        return make()[torch.tensor(scheme.rows_from(fewer))]

    makers = dict(pretrained.tensors.makers)
    for name, make in pretrained.tensors.makers.items():
        if name.endswith(ABSOLUTE):
            makers[name] = partial(table, make, own=1)
        elif name.endswith(UNTIED):
            makers[name] = partial(table, make, own=1 + scheme.resets_cls)
        elif name.endswith(RELATIVE):
            makers[name] = partial(biases, make)
    architecture = {**pretrained.architecture, POSITIONS: scheme.positions}
    return replace(pretrained, tensors=LazyTensors(makers), architecture=architecture)


def more_rows(rows: Tensor, more: int, own: int, how: MorePositions) -> Tensor:
    """[P, D] and `more` rows: the first `own` stay, those behind them are continued from their beginning, or stretched.

    interpolate: linearly, the first and the last of the stretched rows keep their places.
    """
    first, rest = rows[:own], rows[own:]
    size = len(rest) + more
    if how == "interpolate":
        rest = functional.interpolate(rest.t()[None], size, mode="linear", align_corners=True)[0].t()
    else:
        rest = rest[torch.arange(size) % len(rest)]
    return torch.cat([first, rest])
