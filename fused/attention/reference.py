"""Attention inside samples in plain torch, around softmax_dropout.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused.dropout import Dropout
from fused.relative_bias import CompactBias
from fused.samples import Samples
from fused.softmax_dropout.operator import softmax_dropout


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `attention` computes; no host sync. Between the products, softmax_dropout takes its kernel where it can."""
    # Samples become rows of the longest one's length, [n, N, L, K], and the output goes back to its tokens.
    is_key, token = _positions(q, samples)
    queries, keys, values = (_gather(x, token) for x in (q, k, v))
    term = None if term is None else term[:, : samples.longest, : samples.longest]
    if bias is None:  # softmax_dropout always adds one
        bias = CompactBias(q.new_zeros(q.size(1), 1), q.new_zeros(q.size(1), 2))
    p = softmax_dropout(queries @ keys.transpose(2, 3), bias, is_key, q.size(2) ** -0.5, dropout, term)
    out = (p @ values).transpose(1, 2).flatten(0, 1)
    # Positions past a sample's end are all written to an extra token T, which is cut off: no count of tokens is needed
    # on the host, and no boolean index, which would wait for the device.
    return q.new_zeros(q.size(0) + 1, *q.shape[1:]).index_copy(0, token.flatten(), out)[:-1]


def _positions(q: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Whether a sample has a position, and the token there, T where it has not: both [n, L]."""
    position = torch.arange(samples.longest, device=q.device)
    is_key = position < samples.length[:, None]
    return is_key, torch.where(is_key, samples.begin[:, None] + position * samples.stride, q.size(0))


def _gather(x: Tensor, token: Tensor) -> Tensor:
    """x [T, N, K] of the tokens [n, L], 0 for token T: [n, N, L, K]."""
    rows = pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, token.flatten())
    return rows.view(*token.shape, *x.shape[1:]).transpose(1, 2)
