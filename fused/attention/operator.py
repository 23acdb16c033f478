"""Attention inside samples with the compact relative bias or none: the public function, torch operators, gradients.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample.

The way of a call: `attention` checks, then takes the reference or the CPU's own way (cpu.py), or flattens its arguments
for `attention_forward`, an operator that torch.compile sees as one node. That one prepares the small tensors and
launches (launches.py) the kernel (kernels.py); its gradient is `attention_backward`, an operator too.
"""

from math import e, log2

import torch
from torch import Tensor

from fused.attention.cpu import attention_cpu
from fused.attention.launches import HEAD_DIMS, Inputs, backward_launches, bias_gradients, forward_launch
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
        own_way = use_cpu("attention", q) and min(q.size(0), len(samples.begin)) > 0
        return (attention_cpu if own_way else attention_ref)(q, k, v, bias, samples, dropout, term)
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


def _launched(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias | None, samples: Samples,
    dropout: Dropout | None, term: Tensor | None,
) -> Tensor:  # fmt: skip
    """The kernels' output."""
    if q.size(2) not in HEAD_DIMS:
        raise ValueError(f"q is {list(q.shape)}; the kernels have head dimensions {HEAD_DIMS}, reference_only() any")
    if samples.begin.numel() > MOST_SAMPLES:
        raise ValueError(f"samples.begin is {list(samples.begin.shape)}; the kernels take at most {MOST_SAMPLES}")
    # torch's operators take tensors, numbers and None; without dropout there is no seed, which the kernels look at.
    rate, seed, keys, first_head = dropout or (0.0, None, None, 0)
    distances, cls = bias or (None, None)
    begin, length, longest, stride = samples
    flat = (term, begin, length, seed, keys, longest, stride, rate, first_head)
    return attention_forward(q, k, v, distances, cls, *flat)[0]


def _prepared(inputs: Inputs) -> Inputs:
    """The bias in FP32 and in units of log(2); all but q, k, v contiguous.

    Inside the operators, so that their gradients are those of the tensors that were given: nothing but [N, 2 D + 1]
    and [n] is copied, and a term that is a view.
    """
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
    longest: int, stride: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and, for backward alone, log-sum-exp, 0 for tokens of no sample; None: no bias, term or dropout."""
    # Zeros, since the kernel writes nothing for tokens of no sample: padding, or the rest of a packed row.
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
    inputs = Inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head)
    forward_launch(_prepared(inputs), out, lse, architecture(q.device)).start()
    return out, lse


# Shapes and types alone, for torch.compile and opcheck: contiguous, like what the operator makes.
@attention_forward.register_fake
def _(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fused::attention_backward", mutates_args=())
def attention_backward(
    out: Tensor, lse: Tensor, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
    distances: Tensor | None, cls: Tensor | None, term: Tensor | None, begin: Tensor, length: Tensor,
    seed: Tensor | None, keys: Tensor | None, longest: int, stride: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of distances, cls and term (empty where there is none)."""
    # Zeros as in forward; the gradients of q, k, v are contiguous even where those are slices. term_kernel writes all
    # of its output.
    grad_q, grad_k, grad_v = (q.new_zeros(q.shape) for _ in range(3))
    grad_term = _empty_as(term, q)
    # A gradient may arrive expanded or transposed, as that of a sum is; the kernels take one layout.
    arriving = [out, lse, grad_out.contiguous()]
    inputs = Inputs(q, k, v, distances, cls, term, begin, length, seed, keys, longest, stride, rate, first_head)
    grads = [grad_q, grad_k, grad_v, grad_term]
    launches = backward_launches(_prepared(inputs), arriving, grads, architecture(q.device))
    # In this order on one stream: query_kernel writes Delta, which the others read, and the sums for the bias.
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
    """Memory for the gradient of x, on q's device; for None an empty tensor, as operators cannot return None."""
    return q.new_empty(0) if x is None else x.new_empty(x.shape)


@attention_backward.register_fake
def _(out, lse, grad_out, q, k, v, distances, cls, term, *rest):
    return tuple(_empty_as(x, q) for x in (q, k, v, distances, cls, term))


def _setup(ctx, inputs, output):
    # lse never leaves this file: a gradient for it would be a mistake. Saved are the output, one number a query, and
    # the inputs, which live on elsewhere: no probability and no mask. The bias is saved as given and prepared again.
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.numbers = inputs[10:]


def _backward(ctx, grad_out, _):
    out, lse, *inputs = ctx.saved_tensors
    grads = attention_backward(out, lse, grad_out, *inputs, *ctx.numbers)
    # An operator cannot return None: what was not given has an empty tensor for a gradient.
    given = zip(grads, inputs[: len(grads)], strict=True)
    return *(None if x is None else grad for grad, x in given), *[None] * 8


attention_forward.register_autograd(_backward, setup_context=_setup)
