"""Attention inside samples with the compact relative bias: launches, torch operators, and the public function.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample, B side of a tile.
"""

import torch
from torch import Tensor

from fused.attention_kernels import forward_kernel, key_kernel, query_kernel, term_kernel
from fused.attention_reference import Dropout, Samples, attention_ref, drop_threshold
from fused.dispatch import use_kernel
from fused.relative_bias import CompactBias, check_bias

HEAD_DIMS = (32, 64, 128)
LONGEST = 32768
"""Query and key share a 32-bit counter of the dropout mask."""


def tile_side(head_dim: int) -> int:
    """Side of the square tiles. Chosen by registers and stack of compiled kernels; not measured on a GPU."""
    return 64 if head_dim < 128 else 32


def num_warps(head_dim: int) -> int:
    """Warps of the backward kernels: with 4 at head dimension 64 they use more stack. Not measured on a GPU."""
    return 8 if head_dim < 128 else 4


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: CompactBias, samples: Samples,
    dropout: Dropout | None = None, term: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T / sqrt(K) + bias + term) v inside each sample: (out [T, N, K], log-sum-exp [T, N] in FP32).

    q, k, v [T, N, K] may be strided; their last dimension is contiguous. term [N, S, S] with S >= samples.longest is
    full TUPE's. Tokens of no sample give 0. Gradients reach q, k, v, bias and term. Raises ValueError for shapes,
    types and devices that do not fit; reads no tensor on a GPU.
    """
    _check(q, k, v, samples, dropout, term)
    check_bias(bias, q.size(1), q.device)
    if not use_kernel("attention", q, k, v):
        return attention_ref(q, k, v, bias, samples, dropout, term)
    if q.size(2) not in HEAD_DIMS:
        raise ValueError(f"q is {list(q.shape)}; the kernels have head dimensions {HEAD_DIMS}")
    seed, keys, rate, head = (None, None, 0.0, 0) if dropout is None or dropout.rate == 0.0 else (
        dropout.seed, dropout.keys, dropout.rate, dropout.first_head)  # fmt: skip
    return attention_forward(
        q, k, v, bias.distances.float(), bias.cls.float(), term, samples.begin, samples.length, seed, keys,
        samples.longest, samples.step, rate, head,
    )  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, samples: Samples, dropout: Dropout | None, term: Tensor | None) -> None:
    if q.dim() != 3:
        raise ValueError(f"q is {list(q.shape)}; it must be [tokens, heads, head dimension]")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {list(x.shape)} {x.dtype} {x.device}; it must be as q: {list(q.shape)} "
                             f"{q.dtype} {q.device}")  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"{name} has stride {x.stride(2)} in its last dimension; it must be contiguous there")
    if not 0 < samples.longest <= LONGEST:
        raise ValueError(f"samples.longest is {samples.longest}; it must be in 1..{LONGEST}")
    if samples.begin.shape != samples.length.shape or samples.begin.dim() != 1:
        raise ValueError(f"samples.begin is {list(samples.begin.shape)} and samples.length "
                         f"{list(samples.length.shape)}; both must be [n]")  # fmt: skip
    if dropout is not None and not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"dropout.rate is {dropout.rate}; it must be in [0, 1)")
    if dropout is not None and dropout.keys.shape != samples.begin.shape:
        raise ValueError(f"dropout.keys is {list(dropout.keys.shape)}; there are {samples.begin.numel()} samples")
    if term is not None and (
        term.shape != (q.size(1), term.size(-1), term.size(-1)) or term.size(-1) < samples.longest
    ):
        raise ValueError(f"term is {list(term.shape)}; it must be [{q.size(1)}, S, S], S >= {samples.longest}")


def packed_samples(cu_seqlens: Tensor, longest: int) -> Samples:
    """Samples of a packed row from cu_seqlens [n + 1], which starts with 0. Made once per batch.

    Raises ValueError where cu_seqlens is on the CPU and does not start with 0, falls, or has a sample above longest.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be integers [n + 1]")
    length = cu_seqlens.diff()
    if cu_seqlens.device.type == "cpu":
        if cu_seqlens[0] != 0 or bool((length < 0).any()):
            raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; it must start with 0 and never fall")
        if int(length.max()) > longest:
            raise ValueError(f"cu_seqlens has a sample of {int(length.max())} tokens; longest is {longest}")
    return Samples(cu_seqlens[:-1].long(), length.int(), longest)


def padded_samples(length: Tensor, longest: int) -> Samples:
    """Samples of rows laid out [S, B] (row index fastest), row b holding length[b] tokens and then padding."""
    rows = length.numel()
    return Samples(torch.arange(rows, device=length.device), length.int(), longest, rows)


def _numbers(q: Tensor, k: Tensor, v: Tensor, distances: Tensor, term: Tensor | None, step: int, rate: float,
             first_head: int) -> list[int | float]:  # fmt: skip
    """The scalar arguments that all kernels share, in their order."""
    strides = [x.stride(place) for x in (q, k, v) for place in (0, 1)]
    term_len = 0 if term is None else term.size(1)
    scale = q.size(2) ** -0.5
    threshold = drop_threshold(rate)
    return [*strides, step, q.size(1), first_head, distances.size(1), term_len, scale, threshold, 1.0 / (1.0 - rate)]


@torch.library.custom_op("fused::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, distances: Tensor, cls: Tensor, term: Tensor | None, begin: Tensor,
    length: Tensor, seed: Tensor | None, keys: Tensor | None, longest: int, step: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; see `attention`."""
    out = q.new_zeros(q.shape)
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    if begin.numel() == 0:
        return out, lse
    side = tile_side(q.size(2))
    distances, cls = distances.contiguous(), cls.contiguous()
    tensors = [q, k, v, distances, cls, cls if term is None else term.contiguous(), begin, length]
    tensors += [begin if keys is None else keys, begin if seed is None else seed, out, lse]
    forward_kernel[(-(-longest // side), q.size(1), begin.numel())](
        *tensors, *_numbers(q, k, v, distances, term, step, rate, first_head),
        K=q.size(2), B=side, HAS_TERM=term is not None, DROP=rate > 0.0, num_stages=2,
    )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def _(q, k, v, distances, cls, term, begin, length, seed, keys, longest, step, rate, first_head):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fused::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, distances: Tensor,
    cls: Tensor, term: Tensor | None, begin: Tensor, length: Tensor, seed: Tensor | None, keys: Tensor | None,
    longest: int, step: int, rate: float, first_head: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, distances, cls, and of term (empty where there is none)."""
    heads, samples, side = q.size(1), begin.numel(), tile_side(q.size(2))
    tiles = -(-longest // side)
    grads = [q.new_zeros(q.shape) for _ in range(3)]
    diagonals = q.new_zeros(samples, tiles, heads, (tiles + 1) * side, dtype=torch.float32)
    cls_sums = q.new_zeros(samples, tiles, heads, 2, dtype=torch.float32)
    grad_term = q.new_zeros(0 if term is None else term.shape, dtype=torch.float32)
    grad_out, distances, cls = grad_out.contiguous(), distances.contiguous(), cls.contiguous()
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
    inputs = [q, k, v, grad_out, lse, delta, distances, cls, cls if term is None else term.contiguous(), begin, length]
    inputs += [begin if keys is None else keys, begin if seed is None else seed]
    numbers = _numbers(q, k, v, distances, term, step, rate, first_head)
    sizes = {"K": q.size(2), "B": side, "DROP": rate > 0.0, "num_warps": num_warps(q.size(2)), "num_stages": 2}
    if samples:
        grid = (tiles, heads, samples)
        has_term = term is not None
        query_kernel[grid](
            *inputs, grads[0], diagonals, cls_sums, *numbers, diagonals.size(3), HAS_TERM=has_term, **sizes
        )
        key_kernel[grid](*inputs, grads[1], grads[2], *numbers, HAS_TERM=has_term, **sizes)
        if term is not None:
            grid = (-(-term.size(1) // side),) * 2 + (heads,)
            term_kernel[grid](*inputs, grad_term, *numbers, samples, **sizes)
    grad_distances = sum_diagonals(diagonals.sum(0), distances.size(1), side)
    return [*grads, grad_distances, cls_sums.sum((0, 1)), grad_term if term is None else grad_term.to(term.dtype)]


def sum_diagonals(sums: Tensor, width: int, side: int) -> Tensor:
    """Per tile sums [tiles, N, slots] (see query_kernel) to clipped distances [N, width]; gathers, no atomics."""
    tiles, heads, slots = sums.shape
    reach, span = width // 2, tiles * side
    distance = torch.arange(1 - span, span, device=sums.device)
    slot = distance + torch.arange(tiles, device=sums.device)[:, None] * side + side - 1  # [tiles, 2 span - 1]
    inside = (slot >= 0) & (slot < slots)
    at = slot.clamp(0, slots - 1)[:, None].expand(-1, heads, -1)
    full = (sums.gather(2, at) * inside[:, None]).sum(0)
    if reach >= span:
        return torch.nn.functional.pad(full, (reach - span + 1, reach - span + 1))
    middle = span - 1
    inner = full[:, middle - reach : middle + reach + 1].clone()
    inner[:, 0] += full[:, : middle - reach].sum(1)
    inner[:, -1] += full[:, middle + reach + 1 :].sum(1)
    return inner


@attention_backward.register_fake
def _(grad_out, out, lse, grad_lse, q, k, v, distances, cls, term, *rest):
    shape = 0 if term is None else term.shape
    grads = [q.new_empty(x.shape) for x in (q, k, v)]
    last = q.new_empty(shape, dtype=torch.float32 if term is None else term.dtype)
    return [*grads, distances.new_empty(distances.shape), cls.new_empty(cls.shape), last]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.options = inputs[10:]


def _backward(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    gradients = attention_backward(grad_out, out, lse, grad_lse, *inputs, *ctx.options)
    return (*gradients[:5], None if inputs[5] is None else gradients[5], *[None] * 8)


attention_forward.register_autograd(_backward, setup_context=_setup)
