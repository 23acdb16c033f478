"""The fused operators as torch's own functions, which is what METRO's Table 5 compares with, put into the model.

Under autocast: dropout, LayerNorm, softmax and cross-entropy of torch, attention as matmul, softmax, dropout, matmul.
Masks and samples are torch's own random numbers. Arguments are those of the operators that they stand for.

Legend: n samples, L longest sample, N heads, K head dimension, T tokens, M masked positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from fused.attention import CompactBias, Dropout, Samples
from fused.dispatch import reference_only
from fused.layer_norm import RowDropout
from fused.linear_cross_entropy import Sampling, Statistics
from metro_megatron.config.schema import ModelConfig
from metro_megatron.model import attention as attention_module
from metro_megatron.model import norm as norm_module
from metro_megatron.model.heads import Decoding
from metro_megatron.objective import vocabulary as vocabulary_module
from metro_megatron.vocabulary import NUM_SPECIALS


def _autocast(x: Tensor) -> torch.autocast:
    """Off where the run itself is in FP32."""
    return torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: RowDropout | None = None,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)), any part absent."""
    rate, is_last = (0.0, False) if dropout is None else (dropout.rate, dropout.is_last)
    with _autocast(x):
        z = x if x_bias is None else x + x_bias
        z = z if is_last else functional.dropout(z, rate)
        z = z if residual is None else residual + z
        y = functional.layer_norm(z, weight.shape, weight, bias, eps)
        return (functional.dropout(y, rate) if is_last else y).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: CompactBias | None,
    samples: Samples,
    dropout: Dropout | None = None,
    term: Tensor | None = None,
) -> Tensor:
    """[T, N, K] to [T, N, K]; packed samples become padded rows, and go back."""
    shape, length = (samples.begin.numel(), samples.longest), samples.longest
    is_padded = samples.stride == shape[0] and shape[0] * length == q.size(0)
    position = torch.arange(length, device=q.device)
    is_key = position < samples.length[:, None]  # [n, L]
    token = (samples.begin[:, None] + position * samples.stride).clamp(max=q.size(0) - 1)

    def rows(x: Tensor) -> Tensor:
        """[n, N, L, K]"""
        if is_padded:
            return x.view(length, shape[0], *x.shape[1:]).permute(1, 2, 0, 3)
        return x.index_select(0, token.flatten()).view(*shape, *x.shape[1:]).transpose(1, 2)

    with _autocast(q):
        scores = rows(q) @ rows(k).transpose(-1, -2) * q.size(-1) ** -0.5
        if bias is not None:
            scores = scores + dense_bias(bias, length).to(scores.dtype)
        if term is not None:
            scores = scores + term[:, :length, :length]
        padding = torch.zeros_like(is_key, dtype=scores.dtype).masked_fill(~is_key, -math.inf)
        probabilities = (scores + padding[:, None, None]).softmax(-1)
        mixed = functional.dropout(probabilities, 0.0 if dropout is None else dropout.rate) @ rows(v)
    mixed = mixed.to(q.dtype)
    if is_padded:
        return mixed.permute(2, 0, 1, 3).reshape(q.shape)
    # Places past a sample's end go to an extra token, which is cut off.
    target = torch.where(is_key, token, q.size(0)).flatten()
    out = q.new_zeros(q.size(0) + 1, *q.shape[1:])
    return out.index_copy(0, target, mixed.transpose(1, 2).flatten(0, 1))[:-1]


def attention_qkvpacked(
    qkv: Tensor, bias: CompactBias | None, samples: Samples, dropout: Dropout | None = None
) -> Tensor:
    """`attention` of q, k, v = qkv.unbind(2), [T, N, 3, K]."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, bias, samples, dropout)


def dense_bias(bias: CompactBias, length: int) -> Tensor:
    """The bias [N, L, L]: row q is the window of the distances that begins at -q, so that backward needs no sorting."""
    reach = bias.distances.size(1) // 2
    distance = torch.arange(1 - length, length, device=bias.distances.device).clamp(-reach, reach)
    dense = bias.distances.index_select(1, distance + reach).unfold(1, length, 1).flip(1)
    if bias.cls is None:
        return dense
    is_first = torch.arange(length, device=dense.device) == 0
    dense = torch.where(is_first, bias.cls[:, 1, None, None], dense)
    return torch.where(is_first[:, None], bias.cls[:, 0, None, None], dense)


def vocabulary_statistics(
    decoding: Decoding, targets: Tensor, model_config: ModelConfig, group: ProcessGroup,
    sampling: Sampling | None = None,
) -> Statistics:  # fmt: skip
    """Losses [M], most probable ids and, with sampling, samples from all logits [M, V] of a vocabulary in one piece.

    What no objective reads, lse and entropy, is not computed: NaN.
    """
    assert group.size() == 1, "torch's own cross-entropy is measured without tensor parallelism"
    with _autocast(decoding.rows):
        logits = decoding.logits()[:, : model_config.vocab_size]
        loss = functional.cross_entropy(logits, targets, reduction="none")
    nothing = torch.full_like(loss.detach(), math.nan)
    logits = logits.detach()
    return Statistics(loss, nothing, nothing, logits.argmax(-1), sampling and _sample(logits, targets, sampling))


def _sample(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    probabilities[:, :NUM_SPECIALS] = 0.0
    if sampling.disallow_correct:
        probabilities.scatter_(1, targets[:, None], 0.0)
    return probabilities.multinomial(1)[:, 0]


_CALLS: tuple[tuple[str, Any, Callable[..., Any]], ...] = (
    ("layer_norm", norm_module, layer_norm),
    ("attention", attention_module, attention),
    ("attention", attention_module, attention_qkvpacked),
    ("linear_cross_entropy", vocabulary_module, vocabulary_statistics),
)
"""Operators, the module of the model that calls each, and what takes its place there, under the same name."""


@contextmanager
def fused_alone(operator: str) -> Iterator[None]:
    """Inside, the model calls torch's own functions in place of all operators but this one; "" for all of them.

    softmax_dropout is called inside attention's reference only, which then stays.
    """
    kept = {"softmax_dropout": "attention"}.get(operator, operator)
    with ExitStack() as stack:
        if kept != operator:
            stack.enter_context(reference_only(kept))
        for module, function in ((module, function) for name, module, function in _CALLS if name != kept):
            stack.callback(setattr, module, function.__name__, getattr(module, function.__name__))
            setattr(module, function.__name__, function)
        yield
