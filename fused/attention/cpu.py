"""Attention inside samples on the CPU: what `attention_ref` computes, with few passes over memory.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.

Each of q, k and v is gathered once into rows of the longest sample's length and its gradient selected back once; bias,
term and padding are what the product of queries and keys is added to; and of all that is [L, L], backward keeps
probabilities and dropout's mask alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused.dropout import Dropout, keep
from fused.relative_bias import CompactBias, clip_distances
from fused.samples import Samples
from fused.softmax_dropout.operator import MASKED_SCORE


def attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `attention` computes, for q, k, v on the CPU, at least one token and one sample."""
    distances, cls = bias or (None, None)
    return _Attention.apply(q, k, v, distances, cls, term, samples, dropout)


class _Rows(NamedTuple):
    """Samples as rows of length L, for every head: [n N, L, K]."""

    shape: tuple[int, int, int]
    """n, N, L."""
    is_token: Tensor
    """bool [n, 1, 1, L]: False behind a sample's end."""
    source: Tensor
    """int64 [n N L] of each place the row of [T N, K] that it is filled with; behind a sample's end, any."""
    place: Tensor
    """int64 [T N]: of each row of [T N, K] the place that it came to; n N L for tokens of no sample."""

    @classmethod
    def of(cls, samples: Samples, tokens: int, heads: int) -> "_Rows":
        count, length = len(samples.begin), samples.longest
        position, head = torch.arange(length), torch.arange(heads)
        is_token = position < samples.length[:, None]
        token = samples.begin[:, None] + position * samples.stride  # [n, L]
        source = torch.where(is_token, token, 0)[:, None] * heads + head[:, None]
        # Of head 0; what lies behind a sample's end is written to an extra token, which is cut off.
        first = torch.arange(count)[:, None] * (heads * length) + position
        place = torch.full([tokens + 1], count * heads * length)
        place.index_copy_(0, torch.where(is_token, token, tokens).flatten(), first.flatten())
        place = (place[:-1, None] + head * length).clamp(max=count * heads * length)
        return cls((count, heads, length), is_token[:, None, None], source.flatten(), place.flatten())

    def gather(self, x: Tensor) -> Tensor:
        """x [T, N, K] as rows [n N, L, K], FP32 or FP64."""
        count, heads, length = self.shape
        rows = x.reshape(-1, x.size(2)).index_select(0, self.source).view(count * heads, length, x.size(2))
        return rows.to(torch.promote_types(x.dtype, torch.float32))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left [n N, L, L] times right [n N, L, K] as [T, N, K]; 0 for tokens of no sample."""
        rows = right.new_empty(left.size(0) * left.size(1) + 1, right.size(2))
        torch.bmm(left, right, out=rows[:-1].view_as(right))
        rows[-1] = 0.0
        return rows.index_select(0, self.place).view(-1, self.shape[1], right.size(2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, distances, cls, term, samples, dropout):  # type: ignore[override]
        rows = _Rows.of(samples, *q.shape[:2])
        queries, keys, values = (rows.gather(x) for x in (q, k, v))
        ctx.scale = q.size(2) ** -0.5
        p = _addends(rows, distances, cls, term, queries.dtype)
        torch.baddbmm(p, queries, keys.transpose(1, 2), alpha=ctx.scale, out=p)
        torch.softmax(p, -1, out=p)
        kept = None if dropout is None else keep(dropout, *rows.shape[1:]).view(p.shape)
        ctx.keep_scale = 1.0 if dropout is None else dropout.keep_scale
        ctx.rows, ctx.dtype = rows, q.dtype
        ctx.save_for_backward(queries, keys, values, p, kept, distances, cls, term)
        return rows.product(_dropped(p, kept, ctx.keep_scale), values).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor):  # type: ignore[override]
        queries, keys, values, p, kept, distances, cls, term = ctx.saved_tensors
        rows: _Rows = ctx.rows
        # Queries behind a sample's end were filled with any token: nothing flows back from them.
        grad_rows = rows.gather(grad_out)
        grad_rows.view(*rows.shape, -1).mul_(rows.is_token.transpose(2, 3))
        grad_v = rows.product(_dropped(p, kept, ctx.keep_scale).transpose(1, 2), grad_rows)
        grad_scores = grad_rows @ values.transpose(1, 2)
        if kept is not None:
            grad_scores.mul_(kept).mul_(ctx.keep_scale)
        torch._softmax_backward_data(grad_scores, p, -1, p.dtype, grad_input=grad_scores)
        grad_q = rows.product(grad_scores, keys).mul_(ctx.scale)
        grad_k = rows.product(grad_scores.transpose(1, 2), queries).mul_(ctx.scale)
        grads = [x.to(ctx.dtype) for x in (grad_q, grad_k, grad_v)]
        if distances is None and term is None:
            return *grads, *[None] * 5
        grad_sum = grad_scores.view(*rows.shape, -1).sum(0)  # [N, L, L]
        grad_term = None
        if term is not None:
            left = term.size(2) - rows.shape[2]
            grad_term = pad(grad_sum, (0, left, 0, left)).to(term.dtype)
        if distances is None:
            return *grads, None, None, grad_term, None, None
        return *grads, *_bias_gradients(grad_sum, distances, cls), grad_term, None, None


def _addends(rows: _Rows, distances: Tensor | None, cls: Tensor | None, term: Tensor | None, dtype: torch.dtype):
    """What scores are added to, [n N, L, L]."""
    count, heads, length = rows.shape
    addend = torch.zeros(rows.is_token.shape, dtype=dtype).masked_fill_(~rows.is_token, MASKED_SCORE)
    if distances is not None:
        addend = addend + CompactBias(distances, cls).expand(length).to(dtype)
    if term is not None:
        addend = addend + term[:, :length, :length].to(dtype)
    # A copy where there is neither, since the product goes into it.
    return addend.expand(count, heads, length, length).contiguous().view(count * heads, length, length)


def _dropped(p: Tensor, kept: Tensor | None, keep_scale: float) -> Tensor:
    """p with dropout."""
    return p if kept is None else (p * kept).mul_(keep_scale)


def _bias_gradients(grad: Tensor, distances: Tensor, cls: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of distances and cls, from the gradient [N, L, L] of what they expand to, which is overwritten."""
    length, grad_cls = grad.size(1), None
    if cls is not None:
        grad_cls = torch.stack([grad[:, 0].sum(1), grad[:, 1:, 0].sum(1)], dim=1).to(cls.dtype)
        grad[:, 0], grad[:, :, 0] = 0.0, 0.0
    # Each row stands one further to the right than the one of the query behind it: distances are columns.
    slanted = pad(grad.flip(1), (0, length)).flatten(1)[:, :-length].view(-1, length, 2 * length - 1)
    return clip_distances(slanted.sum(1), distances.size(1) // 2).to(distances.dtype), grad_cls
