"""What a user would take in place of each operator. Every function here gets the same bfloat16 inputs.

Those with a dense bias get it as a leaf [N, L, L]: neither its expansion nor its gradient's way back to a table is
counted against them. Dropout is the library's own. Legend: see operators.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.operators import EPSILON, MEASURED, Case, Tensors
from fused.attention import CompactBias

NO_DROPOUT = "ours_no_dropout"


class Unavailable(Exception):
    """A contestant that cannot take part here; the text says why."""


class Prepared(NamedTuple):
    """A function without arguments, what its gradients reach, and what it leaves out."""

    function: Callable[[], tuple[Tensor, ...]]
    """First what gradients flow through."""
    leaves: Sequence[Tensor]
    note: str = ""


def ours(case: Case, t: Tensors, dropout: float) -> Prepared:
    """The fused operator."""
    operator = MEASURED[case.operator]
    leaves = {name: t[name].detach().requires_grad_() for name in operator.leaves}
    inputs = {**t, **leaves}
    return Prepared(lambda: operator.call(inputs, dropout), list(leaves.values()))


def _ours_without_dropout(case: Case, t: Tensors, dropout: float) -> Prepared:
    """What those without dropout are compared with."""
    return ours(case, t, 0.0)._replace(note="without dropout")


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def _autocast(t: Tensor) -> Any:
    return torch.autocast(t.device.type, torch.bfloat16)


def _eager_layer_norm(case: Case, t: Tensors, dropout: float) -> Prepared:
    leaves = _leaves(*(t[name] for name in MEASURED["layer_norm"].leaves))

    def run() -> tuple[Tensor]:
        x, residual, weight, bias, x_bias = leaves
        with _autocast(x):
            z = residual + functional.dropout(x + x_bias, dropout)
            return (functional.layer_norm(z, weight.shape, weight, bias, EPSILON).to(x.dtype),)

    return Prepared(run, leaves)


def _liger_layer_norm(case: Case, t: Tensors, dropout: float) -> Prepared:
    liger_layer_norm = _liger("liger_layer_norm")
    leaves = _leaves(*(t[name] for name in MEASURED["layer_norm"].leaves))

    def run() -> tuple[Tensor]:
        x, residual, weight, bias, x_bias = leaves
        return (liger_layer_norm(residual + functional.dropout(x + x_bias, dropout), weight, bias, EPSILON),)

    return Prepared(run, leaves, "torch's dropout and sum, Liger's LayerNorm")


def _liger(name: str) -> Callable[..., Any]:
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError as error:
        raise Unavailable(f"Liger is not installed ({error})") from error
    return getattr(liger, name)


def _dense_bias(t: Tensors) -> Tensor:
    """[N, L, L] bfloat16."""
    return CompactBias(t["distances"], t["cls"]).expand(t["is_key"].size(1)).bfloat16()


def _padding(t: Tensors) -> Tensor:
    """[n, 1, 1, L]: 0 for keys, -inf for padding."""
    is_key = t["is_key"][:, None, None]
    return torch.zeros_like(is_key, dtype=torch.bfloat16).masked_fill(~is_key, -torch.inf)


def _eager_softmax(case: Case, t: Tensors, dropout: float) -> Prepared:
    scores, bias = leaves = _leaves(t["scores"], _dense_bias(t))
    padding = None if case.is_uniform else _padding(t)

    def run() -> tuple[Tensor]:
        with _autocast(scores):
            return (functional.dropout(_softmax(scores, bias, padding), dropout).to(scores.dtype),)

    return Prepared(run, leaves)


def _softmax(scores: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    x = scores + bias
    return (x if padding is None else x + padding).softmax(-1)


def _padded(t: Tensors) -> list[Tensor]:
    """q, k, v [n, N, L, K] of the packed rows; zeros where there is no token."""
    found = []
    for name in ("q", "k", "v"):
        rows = t[name].new_zeros(*t["is_key"].shape, *t[name].shape[1:])
        rows[t["is_key"]] = t[name]
        found.append(rows.transpose(1, 2).contiguous())
    return found


def _eager_attention(case: Case, t: Tensors, dropout: float) -> Prepared:
    q, k, v, bias = leaves = _leaves(*_padded(t), _dense_bias(t))
    padding = None if case.is_uniform else _padding(t)

    def run() -> tuple[Tensor]:
        with _autocast(q):
            scores = q @ k.transpose(-1, -2) * case.head_dim**-0.5
            return (functional.dropout(_softmax(scores, bias, padding), dropout) @ v,)

    return Prepared(run, leaves, "" if padding is None else "padded rows")


def _sdpa(case: Case, t: Tensors, dropout: float) -> Prepared:
    q, k, v, bias = leaves = _leaves(*_padded(t), _dense_bias(t))
    padding = None if case.is_uniform else _padding(t)

    def run() -> tuple[Tensor]:
        mask = bias[None] if padding is None else bias + padding
        return (functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout),)

    return Prepared(run, leaves, "" if padding is None else "padded rows")


def _flex(case: Case, t: Tensors, dropout: float) -> Prepared:
    """The bias as a captured table [N, L, L]."""
    return _flex_with(case, t, [_dense_bias(t)], lambda table: lambda score, b, h, q, k: score + table[h, q, k])


def _flex_table(case: Case, t: Tensors, dropout: float) -> Prepared:
    """The bias as METRO has it: one number for each distance, two for [CLS]."""
    reach = t["distances"].size(1) // 2

    def score(distances: Tensor, cls: Tensor) -> Callable[..., Tensor]:
        def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inner = distances[h, (k - q).clamp(-reach, reach) + reach]
            first_key = torch.where(k == 0, cls[h, 1], inner)
            return score + torch.where(q == 0, cls[h, 0], first_key)

        return change

    return _flex_with(case, t, [t["distances"], t["cls"]], score)


def _flex_with(case: Case, t: Tensors, tables: Sequence[Tensor], score: Callable[..., Any]) -> Prepared:
    if not case.is_uniform:
        raise Unavailable("measured on samples of one length, where it needs no mask")
    from torch.nn.attention.flex_attention import flex_attention

    leaves = _leaves(*_padded(t), *tables)
    (q, k, v), captured = leaves[:3], leaves[3:]
    is_compiled = q.device.type == "cuda"
    attend = torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention
    change = score(*captured)
    return Prepared(lambda: (attend(q, k, v, score_mod=change),), leaves, "without dropout, which it does not have")


def _fa3(case: Case, t: Tensors, dropout: float) -> Prepared:
    """FlashAttention 3 on the packed rows."""
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(f"FlashAttention 3 is not installed ({error})") from error
    q, k, v = leaves = _leaves(t["q"], t["k"], t["v"])
    bounds, longest = t["cu_seqlens"], t["is_key"].size(1)

    def run() -> tuple[Tensor]:
        out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)
        return (out[0] if isinstance(out, tuple) else out,)

    return Prepared(run, leaves, "without bias and dropout, which it does not have")


def _eager_head(case: Case, t: Tensors, dropout: float) -> Prepared:
    rows, weight, bias = leaves = _leaves(t["rows"], t["weight"], t["bias"])

    def run() -> tuple[Tensor, Tensor]:
        with _autocast(rows):
            logits = functional.linear(rows, weight, bias)
            sample = torch.multinomial(logits.detach().float().softmax(-1), 1)
            return functional.cross_entropy(logits, t["targets"], reduction="none"), sample

    return Prepared(run, leaves)


def _liger_head(case: Case, t: Tensors, dropout: float) -> Prepared:
    head = _liger("liger_fused_linear_cross_entropy")
    rows, weight, bias = leaves = _leaves(t["rows"], t["weight"], t["bias"])
    note = "without a sample; backward is in forward"
    return Prepared(lambda: (head(rows, weight, t["targets"], bias),), leaves, note)


def _torch_head(case: Case, t: Tensors, dropout: float) -> Prepared:
    """torch's own operator in chunks of rows, since torch 2.13."""
    head = getattr(functional, "linear_cross_entropy", None)
    if head is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    rows, weight, bias = leaves = _leaves(t["rows"], t["weight"], t["bias"])

    def run() -> tuple[Tensor]:
        return (head(rows, weight, t["targets"], linear_bias=bias, reduction="sum", options=options),)

    return Prepared(run, leaves, "without a sample; backward is in forward")


Prepare = Callable[[Case, Tensors, float], Prepared]


def _compiled(eager: Prepare) -> Prepare:
    def prepare(case: Case, t: Tensors, dropout: float) -> Prepared:
        function, leaves, note = eager(case, t, dropout)
        return Prepared(torch.compile(function, dynamic=False), leaves, note)

    return prepare


CONTESTANTS: dict[str, dict[str, Prepare]] = {
    "layer_norm": {
        "ours": ours,
        "eager": _eager_layer_norm,
        "liger": _liger_layer_norm,
        "compile": _compiled(_eager_layer_norm),
    },
    "softmax_dropout": {"ours": ours, "eager": _eager_softmax, "compile": _compiled(_eager_softmax)},
    "attention": {
        "ours": ours,
        NO_DROPOUT: _ours_without_dropout,
        "eager": _eager_attention,
        "sdpa": _sdpa,
        "fa3": _fa3,
        "flex": _flex,
        "flex_table": _flex_table,
        "compile": _compiled(_eager_attention),
    },
    "linear_cross_entropy": {
        "ours": ours,
        "eager": _eager_head,
        "torch": _torch_head,
        "liger": _liger_head,
        "compile": _compiled(_eager_head),
    },
}
"""By operator and name, those that are quick to start first."""

COMPILED = ("flex", "flex_table", "compile")
"""Take seconds to start."""
