"""The operators whose signature is in motion, as benchmarks call them; the only place that knows both forms.

Legend: T tokens, N heads, K head dimension, n samples, L longest sample.
"""

from typing import Any

from torch import Tensor

from fused.relative_bias import CompactBias
from fused.softmax_dropout import softmax_dropout

try:
    from fused.attention_dropout import Dropout  # type: ignore[import-not-found]

    from fused.attention import attention, packed_samples  # type: ignore[attr-defined]

    IS_ONE_DROPOUT = True
except ImportError:
    from fused.attention_operator import attention, packed_samples
    from fused.attention_reference import Dropout

    IS_ONE_DROPOUT = False
"""IS_ONE_DROPOUT: whether softmax_dropout takes a Dropout, and attention returns its output alone."""


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias, cu_seqlens: Tensor, longest: int, dropout: float, seed: Tensor,
    keys: Tensor,
) -> Tensor:  # fmt: skip
    """Attention inside the samples of a packed row: q, k, v and result [T, N, K]; cu_seqlens [n + 1]; keys [n]."""
    drop = Dropout(dropout, seed, keys) if dropout else None
    result: Any = attention(q, k, v, bias, packed_samples(cu_seqlens, longest), drop)
    return result if IS_ONE_DROPOUT else result[0]


def padded_softmax(
    scores: Tensor, bias: CompactBias, is_key: Tensor, scale: float, dropout: float, seed: Tensor, keys: Tensor
) -> Tensor:
    """Probabilities after dropout, as the scores [n, N, L, L]; is_key [n, L]; keys [n]."""
    drop: Any = (Dropout(dropout, seed, keys) if dropout else None,) if IS_ONE_DROPOUT else (dropout, seed)
    return softmax_dropout(scores, bias, is_key, scale, *drop)
