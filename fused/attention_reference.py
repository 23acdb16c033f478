"""Attention inside samples in plain torch, and the dropout mask that the kernels draw.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused.relative_bias import CompactBias


class Samples(NamedTuple):
    """Where samples lie among T tokens: token i of sample b is begin[b] + i * step.

    begin [n] int64, length [n] int32, longest >= every length and known on the host. Packed rows have step 1;
    rows [S, B] with the row index fastest have begin = 0..B-1 and step = B.
    """

    begin: Tensor
    length: Tensor
    longest: int
    step: int = 1


class Dropout(NamedTuple):
    """Rate in [0, 1), seed [1] int64, keys [n] int64 that name the samples, first head of this rank.

    An element is dropped by (seed, key of its sample, head, query, key) and nothing else, so that packing, tiles and
    tensor parallelism do not change the mask.
    """

    rate: float
    seed: Tensor
    keys: Tensor
    first_head: int = 0


def drop_threshold(rate: float) -> int:
    """31 random bits at or above it keep an element."""
    return int(rate * 2**31)


def _philox(seed: Tensor, counter: list[Tensor]) -> Tensor:
    """First word of Philox-4x32-10 of 32-bit counters held in int64; seed is int64."""
    low32 = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 by 32 bit product, without passing 63 bits."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def kept(dropout: Dropout, sample: int, num_heads: int, length: int) -> Tensor:
    """Dropout's mask [N, length, length] of one sample, True where kept."""
    place = torch.arange(length, device=dropout.keys.device)
    head = torch.arange(num_heads, device=place.device) + dropout.first_head
    places = ((place[:, None] << 16) | place[None, :]).expand(num_heads, -1, -1)
    key = dropout.keys[sample].expand_as(places)
    words = [places, head[:, None, None].expand_as(places), key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    return (_philox(dropout.seed, words) >> 1) >= drop_threshold(dropout.rate)


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `attention` computes, one sample at a time: (out [T, N, K], log-sum-exp [T, N]).

    Half precision is computed in FP32, float64 stays.
    """
    inner = torch.promote_types(q.dtype, torch.float32)
    out = (q + k + v).to(inner) * 0
    lse = out.sum(-1)
    dense = bias.expand(samples.longest).to(inner)
    if term is not None:
        dense = dense + term[:, : samples.longest, : samples.longest].to(inner)
    for sample, (begin, length) in enumerate(zip(samples.begin.tolist(), samples.length.tolist(), strict=True)):
        token = begin + torch.arange(length, device=q.device) * samples.step
        rows, keys, values = (x[token].to(inner).transpose(0, 1) for x in (q, k, v))
        scores = rows @ keys.transpose(1, 2) * q.size(-1) ** -0.5 + dense[:, :length, :length]
        probabilities = scores.softmax(-1)
        if dropout is not None:
            mask = kept(dropout, sample, q.size(1), length)
            probabilities = probabilities * mask / (1.0 - dropout.rate)
        out = out.index_copy(0, token, (probabilities @ values).transpose(0, 1))
        lse = lse.index_copy(0, token, scores.logsumexp(-1).transpose(0, 1))
    return out.to(q.dtype), lse
