"""Attention with a relative position bias over packed and over padded rows.

Legend: T tokens of a packed row, n samples in it, L longest sample, B padded rows, S their length,
N heads of this rank, K head dimension.
"""

import torch
from torch import Tensor

from fused.softmax_dropout import softmax_dropout


def padded_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, is_key: Tensor, dropout: float) -> Tensor:
    """Attention of rows [B, S, N, K] with bias [N, S, S] and is_key [B, S]; returns [B, S, N, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, S, K]
    scores = q @ k.transpose(-1, -2)
    probabilities = softmax_dropout(scores, bias, is_key, q.size(-1) ** -0.5, dropout)
    return (probabilities @ v).transpose(1, 2)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float
) -> Tensor:
    """Attention inside each sample of a packed row [T, N, K]; returns [T, N, K].

    cu_seqlens [n + 1] starts with 0; tokens from its last entry on are padding and give finite values that
    mean nothing. bias [N, L, L] is indexed by the places inside a sample, with L = max_seqlen.
    """
    num_tokens, num_samples = q.size(0), cu_seqlens.numel() - 1
    if max_seqlen == 0:
        return (q + k + v) * 0 + bias.sum().to(q.dtype) * 0  # every parameter still gets a gradient, of zero
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    place = torch.arange(max_seqlen, device=q.device)
    is_key = place < lengths[:, None]  # [n, L]
    token = (starts[:, None] + place).clamp(max=num_tokens - 1)  # [n, L]
    out = padded_attention(q[token], k[token], v[token], bias, is_key, dropout)  # [n, L, N, K]

    position = torch.arange(num_tokens, device=q.device)
    sample = torch.bucketize(position, cu_seqlens[1:], right=True).clamp(max=num_samples - 1)
    inside = (position - starts[sample]).clamp(max=max_seqlen - 1)
    return out.flatten(0, 1)[sample * max_seqlen + inside]
