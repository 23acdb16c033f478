"""Attention inside samples, with the compact relative bias or none: public functions, torch operators, launches.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.
"""

from math import e, log2

import torch
from torch import Tensor

from fused.attention.dropout import LONGEST, Dropout, checked_dropout
from fused.attention.launches import HEAD_DIMS, Inputs, backward_launches, bias_gradients, forward_launch
from fused.attention.reference import attention_ref, lse_ref
from fused.dispatch import architecture, use_kernel
from fused.relative_bias import CompactBias, check_bias
from fused.samples import Samples, check_samples, packed_samples, padded_samples

__all__ = ["CompactBias", "Dropout", "Samples", "attention", "attention_with_lse", "packed_samples", "padded_samples"]

MOST_SAMPLES = 65_535
"""The third dimension of a GPU's grid."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(softmax(q k^T / sqrt(K) + bias + term)) v inside each sample, [T, N, K].

    q, k, v [T, N, K] may be strided; their last dimension is contiguous. bias None: no relative bias. term [N, S, S]
    with S >= samples.longest is full TUPE's. Tokens of no sample give 0. Gradients reach q, k, v, bias and term.
    Raises ValueError for shapes, types and devices that do not fit; reads no tensor on a GPU.
    """
    dropout = _checked(q, k, v, bias, samples, dropout, term)
    if not use_kernel("attention", q):
        return attention_ref(q, k, v, bias, samples, dropout, term)
    return _launched(q, k, v, bias, samples, dropout, term)[0]


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention`, and the logarithm of the sum of exponentials of each query's scores, [T, N] in FP32 or float64."""
    dropout = _checked(q, k, v, bias, samples, dropout, term)
    if not use_kernel("attention", q):
        return attention_ref(q, k, v, bias, samples, dropout, term), lse_ref(q, k, bias, samples, term)
    return _launched(q, k, v, bias, samples, dropout, term)


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
    check_samples(samples, LONGEST, q.device)
    if term is not None:
        heads, size = q.size(1), term.size(-1) if term.dim() else 0
        if term.shape != (heads, size, size) or not samples.longest <= size <= LONGEST:
            raise ValueError(
                f"term is {list(term.shape)}; it must be [{heads}, S, S] with S in {samples.longest}..{LONGEST}"
            )
        if not term.is_floating_point() or term.device != q.device:
            raise ValueError(f"term is {term.dtype} on {term.device}; it must be of a float type on {q.device}")
    return checked_dropout(dropout, samples.begin.numel(), samples.longest, q.device)


def _launched(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None, term: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels' output and log-sum-exp."""
    if q.size(2) not in HEAD_DIMS:
        raise ValueError(f"q is {list(q.shape)}; the kernels have head dimensions {HEAD_DIMS}, reference_only() any")
    if samples.begin.numel() > MOST_SAMPLES:
        raise ValueError(f"samples.begin is {list(samples.begin.shape)}; the kernels take at most {MOST_SAMPLES}")
    rate, seed, keys, first_head = dropout or (0.0, None, None, 0)
    begin, length, longest, step = samples
    distances, cls = bias or (None, None)
    return attention_forward(q, k, v, distances, cls, term, begin, length, seed, keys, longest, step, rate, first_head)


def _prepared(inputs: Inputs) -> Inputs:
    """The bias in FP32 and in units of log(2); all but q, k, v contiguous."""
    term, seed, keys = (None if x is None else x.contiguous() for x in (inputs.term, inputs.seed, inputs.keys))
    return inputs._replace(
        distances=None if inputs.distances is None else (inputs.distances.float() * log2(e)).contiguous(),
        cls=None if inputs.cls is None else (inputs.cls.float() * log2(e)).contiguous(),
        term=term,
        begin=inputs.begin.contiguous(),
        length=inputs.length.contiguous(),
        seed=seed,
        keys=keys,
    )


@torch.library.custom_op("fused::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, distances: Tensor | None, cls: Tensor | None, term: Tensor | None,
    begin: Tensor, length: Tensor, seed: Tensor | None, keys: Tensor | None,
    longest: int, step: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp, 0 for tokens of no sample; seed and keys None: no dropout; others None: no bias."""
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
    inputs = Inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, step, rate, first_head)
    forward_launch(_prepared(inputs), out, lse, architecture(q.device)).start()
    return out, lse


@attention_forward.register_fake
def _(q, k, v, distances, cls, term, begin, length, seed, keys, longest, step, rate, first_head):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fused::attention_backward", mutates_args=())
def attention_backward(
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    distances: Tensor | None, cls: Tensor | None, term: Tensor | None, begin: Tensor, length: Tensor,
    seed: Tensor | None, keys: Tensor | None, longest: int, step: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of distances, cls and term (empty where there is none)."""
    grad_q, grad_k, grad_v = (q.new_zeros(q.shape) for _ in range(3))
    grad_term = _empty_as(term, q)
    arriving = [out, lse, grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()]
    inputs = Inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, step, rate, first_head)
    grads = [grad_q, grad_k, grad_v, grad_term]
    launches = backward_launches(_prepared(inputs), arriving, grads, architecture(q.device))
    for launch in launches:
        launch.start()
    grad_distances, grad_cls = _empty_as(None, q), _empty_as(None, q)
    if distances is not None:
        of_distances, of_cls = bias_gradients(launches[0], distances.size(1))
        grad_distances = of_distances.to(distances.dtype)
        if cls is not None and of_cls is not None:
            grad_cls = of_cls.to(cls.dtype)
    return grad_q, grad_k, grad_v, grad_distances, grad_cls, grad_term


def _empty_as(x: Tensor | None, q: Tensor) -> Tensor:
    """Memory for the gradient of x, on q's device; operators of torch return no None, so no numbers stand for it."""
    return q.new_empty(0) if x is None else x.new_empty(x.shape)


@attention_backward.register_fake
def _(out, lse, grad_out, grad_lse, q, k, v, distances, cls, term, *rest):
    return tuple(_empty_as(x, q) for x in (q, k, v, distances, cls, term))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.numbers = inputs[10:]


def _backward(ctx, grad_out, grad_lse):
    out, lse, *inputs = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = attention_backward(out, lse, grad_out, grad_lse, *inputs, *ctx.numbers)
    given = zip(grads, inputs[: len(grads)], strict=True)
    return *(None if x is None else grad for grad, x in given), *[None] * 8


attention_forward.register_autograd(_backward, setup_context=_setup)
