"""Attention inside samples in plain torch, around softmax_dropout.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused.attention.dropout import Dropout
from fused.relative_bias import CompactBias
from fused.samples import Samples
from fused.softmax_dropout.operator import MASKED_SCORE, softmax_dropout


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `attention` computes; no host sync. Between the products, softmax_dropout takes its kernel where it can."""
    is_key, token = _places(q, samples)
    queries, keys, values = (_gather(x, token) for x in (q, k, v))
    term = None if term is None else term[:, : samples.longest, : samples.longest]
    if bias is None:  # softmax_dropout always adds one
        bias = CompactBias(q.new_zeros(q.size(1), 1), q.new_zeros(q.size(1), 2))
    p = softmax_dropout(queries @ keys.transpose(2, 3), bias, is_key, q.size(2) ** -0.5, dropout, term)
    out = (p @ values).transpose(1, 2).flatten(0, 1)
    return q.new_zeros(q.size(0) + 1, *q.shape[1:]).index_copy(0, token.flatten(), out)[:-1]


def lse_ref(q: Tensor, k: Tensor, bias: CompactBias | None, samples: Samples, term: Tensor | None = None) -> Tensor:
    """The logarithm of the sum of exponentials of each query's scores, [T, N]; FP32, or float64 in float64."""
    is_key, token = _places(q, samples)
    inner = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (_gather(x, token).to(inner) for x in (q, k))
    scores = queries @ keys.transpose(2, 3) * q.size(2) ** -0.5
    if bias is not None:
        scores = scores + bias.expand(samples.longest).to(inner)
    if term is not None:
        scores = scores + term[:, : samples.longest, : samples.longest].to(inner)
    lse = scores.masked_fill(~is_key[:, None, None, :], MASKED_SCORE).logsumexp(3).transpose(1, 2).flatten(0, 1)
    return lse.new_zeros(q.size(0) + 1, q.size(1)).index_copy(0, token.flatten(), lse)[:-1]


def _places(q: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Whether a sample has a position, and the token there, T where it has not: both [n, L]."""
    place = torch.arange(samples.longest, device=q.device)
    is_key = place < samples.length[:, None]
    return is_key, torch.where(is_key, samples.begin[:, None] + place * samples.step, q.size(0))


def _gather(x: Tensor, token: Tensor) -> Tensor:
    """x [T, N, K] of the tokens [n, L], 0 for token T: [n, N, L, K]."""
    rows = pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, token.flatten())
    return rows.view(*token.shape, *x.shape[1:]).transpose(1, 2)
