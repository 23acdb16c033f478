"""Attention inside samples with the compact relative bias or none: the public function, torch operators, gradients.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.

The way of a call: `attention` checks, then takes the reference or the CPU's own way (cpu.py), or flattens its arguments
for `attention_forward`, an operator that torch.compile sees as one node. That one launches (launches.py) the kernel
(kernels.py); its gradient is `attention_backward`, an operator too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused.attention.cpu import attention_cpu
from fused.attention.launches import HEAD_DIMS, Inputs, backward_launches, forward_launch
from fused.attention.reference import attention_ref
from fused.dispatch import architecture, use_cpu, use_kernel
from fused.dropout import MOST_POSITIONS, Dropout, checked_dropout
from fused.relative_bias import CompactBias, check_bias
from fused.samples import Samples, check_samples

MOST_SAMPLES = 65_535
"""The third dimension of a GPU's grid, which has the samples; heads are the second, with the same limit."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(softmax(q k^T / sqrt(K) + bias + term)) v inside each sample, [T, N, K].

    q, k, v [T, N, K] may be strided; their last dimension is contiguous. bias None: no relative bias. term [N, S, S]
    with S >= samples.longest is full TUPE's. Tokens of no sample give 0. Gradients reach q, k, v, bias and term.
    Raises ValueError for shapes, types and devices that do not fit; reads no tensor on a GPU.
    """
    # Checked here once, in front of both: kernel and reference refuse the same.
    dropout = _checked(q, k, v, bias, samples, dropout, term)
    if not use_kernel("attention", q):
        return _without_kernel(q, samples)(q, k, v, bias, samples, dropout, term)
    return _launched(q, k, v, bias, samples, dropout, term)


def attention_qkvpacked(
    qkv: Tensor, bias: CompactBias | None, samples: Samples, dropout: Dropout | None = None
) -> Tensor:
    """`attention` of q, k, v = qkv.unbind(2), [T, N, 3, K], whose gradient is written as one tensor: nothing is copied.

    Raises ValueError as attention does.
    """
    if qkv.dim() != 4 or qkv.size(2) != 3:
        raise ValueError(f"qkv is {list(qkv.shape)}; it must be [tokens, heads, 3, head dimension]")
    q, k, v = qkv.unbind(2)
    dropout = _checked(q, k, v, bias, samples, dropout, None)
    if not use_kernel("attention", q):
        return _without_kernel(q, samples)(q, k, v, bias, samples, dropout)
    return _launched(qkv, None, None, bias, samples, dropout, None)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None, term: Tensor | None,
) -> Dropout | None:  # fmt: skip
    """The dropout, None where its rate is 0. Raises ValueError for the first argument that does not fit."""
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q is {list(q.shape)} {q.dtype}; it must be [tokens, heads, head dimension] of a float type")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {list(x.shape)} {x.dtype} on {x.device}; "
                f"it must be as q: {list(q.shape)} {q.dtype} on {q.device}"
            )
        if x.stride(2) != 1:
            raise ValueError(f"{name} has stride {x.stride(2)} in its last dimension; it must be contiguous there")
    if bias is not None:
        check_bias(bias, q.size(1), q.device)
    check_samples(samples, MOST_POSITIONS, q.device)
    if term is not None:
        heads, size = q.size(1), term.size(-1) if term.dim() else 0
        if term.shape != (heads, size, size) or not samples.longest <= size <= MOST_POSITIONS:
            raise ValueError(
                f"term is {list(term.shape)}; it must be [{heads}, S, S] with S in {samples.longest}..{MOST_POSITIONS}"
            )
        if not term.is_floating_point() or term.device != q.device:
            raise ValueError(f"term is {term.dtype} on {term.device}; it must be of a float type on {q.device}")
    return checked_dropout(dropout, samples.begin.numel(), samples.longest, q.device)


def _without_kernel(q: Tensor, samples: Samples) -> Callable[..., Tensor]:
    has_scores = min(q.size(0), len(samples.begin)) > 0
    return attention_cpu if has_scores and use_cpu("attention", q) else attention_ref


def _launched(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None, term: Tensor | None,
) -> Tensor:  # fmt: skip
    """The kernels' output; q is all three together, [T, N, 3, K], where k and v are None."""
    if q.size(-1) not in HEAD_DIMS:
        raise ValueError(f"q is {list(q.shape)}; the kernels have head dimensions {HEAD_DIMS}, reference_only() any")
    if samples.begin.numel() > MOST_SAMPLES:
        raise ValueError(f"samples.begin is {list(samples.begin.shape)}; the kernels take at most {MOST_SAMPLES}")
    # torch's operators take tensors, numbers and None; without dropout there is no seed, which the kernels look at.
    rate, seed, keys, first_head = dropout or (0.0, None, None, 0)
    distances, cls = bias or (None, None)
    begin, length, longest, stride = samples
    flat = (term, begin, length, seed, keys, longest, stride, rate, first_head)
    return attention_forward(q, k, v, distances, cls, *flat)[0]


def _inputs(
    q: Tensor, k: Tensor | None, v: Tensor | None, distances: Tensor | None, cls: Tensor | None, term: Tensor | None,
    begin: Tensor, length: Tensor, seed: Tensor | None, keys: Tensor | None, *numbers: float,
) -> Inputs:  # fmt: skip
    """Three slices where all stand together, and all others contiguous: no copy where they are, as the model's are."""
    small = (None if x is None else x.contiguous() for x in (distances, cls, term, begin, length, seed, keys))
    return Inputs(*_parts(q, k, v), *small, *numbers)  # type: ignore[arg-type]


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    """q, k, v, each [T, N, K]."""
    return q.unbind(2) if k is None or v is None else (q, k, v)


@torch.library.custom_op("fused::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, distances: Tensor | None, cls: Tensor | None, term: Tensor | None,
    begin: Tensor, length: Tensor, seed: Tensor | None, keys: Tensor | None,
    longest: int, stride: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and, for backward alone, log-sum-exp; None: no bias, term or dropout, or k and v in q, [T, N, 3, K].

    For tokens of no sample, padding or the rest of a packed row, output is 0 and log-sum-exp undefined.
    """
    inputs = _inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head)
    out, lse = inputs.q.new_zeros(inputs.q.shape), _empty_lse(inputs.q)
    forward_launch(inputs, out, lse, architecture(q.device)).start()
    return out, lse


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


# Shapes and types alone, for torch.compile and opcheck: contiguous, like what the operator makes.
@attention_forward.register_fake
def _(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head):
    part = _parts(q, k, v)[0]
    return part.new_empty(part.shape), _empty_lse(part)


@torch.library.custom_op("fused::attention_backward", mutates_args=())
def attention_backward(
    out: Tensor, lse: Tensor, grad_out: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    distances: Tensor | None, cls: Tensor | None, term: Tensor | None, begin: Tensor, length: Tensor,
    seed: Tensor | None, keys: Tensor | None, longest: int, stride: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v together, [T, N, 3, K], and of distances, cls and term (empty where there is none)."""
    inputs = _inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head)
    # Zeros as in forward; the others are written everywhere.
    grads = _empty_gradients(q, k, v, distances, cls, term)
    grads[0].zero_()
    # A gradient may arrive expanded or transposed, as that of a sum is; the kernels take one layout.
    arriving = [out, lse, grad_out.contiguous()]
    written = [grads[0], *(grad if grad.numel() else None for grad in grads[1:])]
    # On one stream: query_kernel writes what the others read.
    for launch in backward_launches(inputs, arriving, written, architecture(q.device)).values():
        launch.start()
    return grads


def _empty_gradients(
    q: Tensor, k: Tensor | None, v: Tensor | None, distances: Tensor | None, cls: Tensor | None, term: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what attention_backward returns; empty for None, which operators cannot return."""
    tokens, heads, head_dim = _parts(q, k, v)[0].shape
    of_distances, of_cls, of_term = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (distances, cls, term)
    )
    return q.new_empty(tokens, heads, 3, head_dim), of_distances, of_cls, of_term


@attention_backward.register_fake
def _(out, lse, grad_out, q, k, v, distances, cls, term, *rest):
    return _empty_gradients(q, k, v, distances, cls, term)


def _setup(ctx, inputs, output):
    # lse never leaves this file: a gradient for it would be a mistake. Saved are the output, one number a query, and
    # the inputs, which live on elsewhere: no probability and no mask.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.numbers = inputs[10:]


def _backward(ctx, grad_out, _):
    out, lse, *inputs = ctx.saved_tensors
    grad_qkv, *others = attention_backward(out, lse, grad_out, *inputs, *ctx.numbers)
    of_parts = (grad_qkv, None, None) if inputs[1] is None else grad_qkv.unbind(2)
    of_others = (None if x is None else grad for grad, x in zip(others, inputs[3:6], strict=True))
    return *of_parts, *of_others, *[None] * 8


attention_forward.register_autograd(_backward, setup_context=_setup)
