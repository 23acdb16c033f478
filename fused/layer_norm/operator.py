"""LayerNorm of a residual stream: LN(residual + dropout(x + x_bias)), any part absent; FP32 inside.

Legend: H hidden, R rows, G programs of the backward kernel. The dropout mask is a function of (seed, key of the row,
column) and is drawn again in backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused.ahead_of_time import ARCHITECTURES, HIDDEN_SIZES, PROCESSORS, ROW_TOKENS, CompileCase, meta
from fused.dispatch import Launch, architecture, processors, use_kernel
from fused.dropout import check_dropout, drop_threshold, keep_mask, keep_scale
from fused.layer_norm.kernels import backward_kernel, column_kernel, forward_kernel
from fused.rows import row_block, row_stages, row_warps

WIDEST = 16_384
"""Largest H of the kernels: a program holds a row in registers. Backward spills some of them above 4,096."""

FORWARD_ELEMENTS = {80: 16, 90: 16}
BACKWARD_ELEMENTS = {80: 8, 90: 8}
"""Elements of a row in each thread, by architecture; 8 are one 128-bit load of half precision. Forward holds one row:
16 a thread give 768 columns two warps, 40 to 48 registers and room for some 20 rows at once on a processor. Backward
holds a row, its gradient and three rows of sums, and with 8 keeps to about 100 (128 from 1,536 columns on). Chosen by
registers [docs/kernels_compiled.md], not by measurement on a GPU."""

WARPS_PER_PROCESSOR = {80: 16, 90: 16}
"""Of backward, whose programs stay for the whole run: as many as its registers allow at once (65,536 / (16 * 32) = 128
a thread). Each program leaves a row of column sums, so that fewer mean less to add up. Not measured on a GPU."""

COLUMN_TILE = (256, 16)
"""Rows and columns that a program adds up at a time: narrow, so that 48 programs a vector share 768 columns, and each
row is 64 bytes, two sectors of memory; 32 numbers a thread of 4 warps. Not measured on a GPU."""


class RowDropout(NamedTuple):
    """Drops an element by (seed, key of its row, column) and nothing else."""

    rate: float
    """In [0, 1); rounded to 2^-16."""
    seed: Tensor
    """[1] int64."""
    keys: Tensor
    """[R] int64: names of the rows, so that a mask does not depend on where in a batch they stand."""
    is_last: bool = False
    """Whether the result is dropped, in place of x: dropout(LN(residual + x + x_bias))."""


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
    """LN(residual + dropout(x + x_bias)) over the last dimension of x [..., H], in x's dtype.

    weight, bias, x_bias [H]; residual as x. Gradients reach all five tensors. Raises ValueError for shapes, types and
    devices that do not fit; reads no tensor on a GPU.
    """
    _check(x, weight, bias, residual, x_bias, dropout)
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    if not use_kernel("layer_norm", x):
        return layer_norm_ref(x, weight, bias, eps, residual=residual, x_bias=x_bias, dropout=dropout)
    if x.size(-1) > WIDEST:
        raise ValueError(f"x is {list(x.shape)}; the kernels take rows of at most {WIDEST}, reference_only() any")
    # Operators of torch take tensors and numbers only, no NamedTuple: dropout as four arguments, no seed for none.
    mask = (0.0, None, None, False) if dropout is None else dropout
    return layer_norm_forward(x, weight, bias, eps, residual, x_bias, *mask)[0]


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: RowDropout | None = None,
) -> Tensor:
    """What layer_norm computes, in plain torch; half precision in FP32, float64 in float64."""
    inner = torch.promote_types(x.dtype, torch.float32)
    z = x.to(inner)
    if x_bias is not None:
        z = z + x_bias.to(inner)
    if dropout is not None and not dropout.is_last:
        z = drop_rows(z, dropout)
    if residual is not None:
        z = z + residual.to(inner)
    y = functional.layer_norm(z, weight.shape, weight.to(inner), bias.to(inner), eps)
    if dropout is not None and dropout.is_last:
        y = drop_rows(y, dropout)
    return y.to(x.dtype)


def drop_rows(x: Tensor, dropout: RowDropout) -> Tensor:
    """dropout(x) of x [..., H] in plain torch, with the mask of the kernels; is_last says nothing here."""
    threshold = drop_threshold(dropout.rate)
    kept = keep_mask(dropout.seed, threshold, x.size(-1), dropout.keys, dropout.keys >> 32)  # [R, H]
    return torch.where(kept.view(x.shape), x * keep_scale(threshold), 0.0)  # backward keeps the mask alone, in bytes


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    dropout: RowDropout | None,
) -> None:
    """Raise ValueError for the first argument that does not fit x."""
    if x.dim() == 0 or x.size(-1) == 0 or not x.is_floating_point():
        raise ValueError(f"x is {list(x.shape)} {x.dtype}; it must be [..., H] of a floating point type")
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:] or not vector.is_floating_point() or vector.device != x.device:
            raise ValueError(
                f"{name} is {list(vector.shape)} {vector.dtype} on {vector.device}; "
                f"it must be {list(x.shape[-1:])} of a floating point type on {x.device}"
            )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype} on {residual.device}; "
            f"it must be as x: {list(x.shape)} {x.dtype} on {x.device}"
        )
    if dropout is None:
        return
    check_dropout(dropout.rate, dropout.seed, x.device)
    keys, rows = dropout.keys, x.shape[:-1].numel()
    if keys.shape != (rows,) or keys.dtype != torch.int64 or keys.device != x.device:
        raise ValueError(
            f"dropout.keys is {list(keys.shape)} {keys.dtype} on {keys.device}; "
            f"it must be [{rows}] torch.int64 on {x.device}"
        )


def _forward_outputs(x: Tensor, is_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z (empty where x itself is normalized), mean, rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape if is_sum else 0), mean, rstd


def _forward_launch(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], eps: float, rate: float, is_last: bool, arch: int
) -> Launch:
    """inputs: x, residual, x_bias, weight, bias, seed, keys; outputs: those of _forward_outputs."""
    (x, residual, x_bias, weight, bias, seed, keys), (y, z, mean, rstd) = inputs, outputs
    threshold, hidden = drop_threshold(rate), y.size(-1)
    arguments = {
        "X": x, "Residual": residual, "XBias": x_bias, "Weight": weight, "Bias": bias, "Seed": seed, "Keys": keys,
        "Y": y, "Z": z if z.numel() else None, "Mean": mean, "Rstd": rstd,
        "eps": eps, "threshold": threshold, "scale": keep_scale(threshold),
        "IS_LAST": is_last, "H": hidden, "BLOCK": row_block(hidden),
    }  # fmt: skip
    return Launch(forward_kernel, (mean.numel(),), arguments, row_warps(hidden, FORWARD_ELEMENTS[arch]))


@torch.library.custom_op("fused::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, x_bias: Tensor | None,
    rate: float, seed: Tensor | None, keys: Tensor | None, is_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y; the sum that was normalized, empty where it is x; its mean and reciprocal deviation. seed None: no dropout."""
    # Kernels take rows without gaps. No copy where x is contiguous, as activations are; a slice is copied.
    inputs = [None if one is None else one.contiguous() for one in (x, residual, x_bias, weight, bias, seed, keys)]
    outputs = _forward_outputs(x, _is_sum(residual, x_bias, seed, is_last))
    _forward_launch(inputs, outputs, eps, rate, is_last, architecture(x.device)).start()
    return outputs


def _is_sum(residual: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, is_last: bool) -> bool:
    """Whether what is normalized is not x itself, so that it must be stored for backward."""
    return residual is not None or x_bias is not None or (seed is not None and not is_last)


# Shapes and types without running anything, for torch.compile; the same function as the operator's own outputs.
@layer_norm_forward.register_fake
def _(x, weight, bias, eps, residual, x_bias, rate, seed, keys, is_last):
    return _forward_outputs(x, _is_sum(residual, x_bias, seed, is_last))


def _backward_outputs(
    z: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, is_x_dropped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, x (empty where it is that of z), weight, bias, x_bias (empty where there is none)."""
    grad_weight, grad_bias = (vector.new_empty(vector.shape) for vector in (weight, bias))
    grad_x_bias = z.new_empty(0) if x_bias is None else x_bias.new_empty(x_bias.shape)
    return z.new_empty(z.shape), z.new_empty(z.shape if is_x_dropped else 0), grad_weight, grad_bias, grad_x_bias


def _backward_launches(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], rate: float, arch: int, processors: int
) -> tuple[Launch, Launch]:
    """inputs: grad_y, z, mean, rstd, weight, seed, keys; outputs: those of _backward_outputs."""
    (grad_y, z, mean, rstd, weight, seed, keys), (grad_z, grad_x, grad_weight, grad_bias, grad_x_bias) = inputs, outputs
    rows, hidden = grad_z.numel() // grad_z.size(-1), grad_z.size(-1)
    threshold, warps = drop_threshold(rate), row_warps(hidden, BACKWARD_ELEMENTS[arch])
    # No more programs than rows, and at least one, so that sums of no rows are written as 0.
    programs = max(1, min(rows, processors * max(1, WARPS_PER_PROCESSOR[arch] // warps)))
    has_x_bias = grad_x_bias.numel() > 0
    sums = grad_z.new_empty(2 + has_x_bias, programs, hidden, dtype=torch.float32)
    arguments = {
        "GradY": grad_y, "Z": z, "Mean": mean, "Rstd": rstd, "Weight": weight, "Seed": seed, "Keys": keys,
        "GradZ": grad_z, "GradX": grad_x if grad_x.numel() else None, "Sums": sums,
        "rows": rows, "threshold": threshold, "scale": keep_scale(threshold),
        "HAS_X_BIAS": has_x_bias, "H": hidden, "BLOCK": row_block(hidden),
        "STAGES": row_stages(hidden, 2 * grad_z.element_size()),
    }  # fmt: skip
    columns = {
        "Sums": sums, "GradWeight": grad_weight, "GradBias": grad_bias,
        "GradXBias": grad_x_bias if has_x_bias else None, "programs": programs,
        "H": hidden, "ROWS": COLUMN_TILE[0], "COLUMNS": COLUMN_TILE[1],
    }  # fmt: skip
    grid = (-(-hidden // COLUMN_TILE[1]), 2 + has_x_bias)
    return Launch(backward_kernel, (programs,), arguments, warps), Launch(column_kernel, grid, columns)


@torch.library.custom_op("fused::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad_y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    seed: Tensor | None, keys: Tensor | None, rate: float, is_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of z, x (empty where x is not dropped: that of z), weight, bias and x_bias (empty where none)."""
    outputs = _backward_outputs(z, weight, bias, x_bias, seed is not None and not is_last)
    # mean and rstd come from forward, contiguous; the rest may be as the caller or the graph laid it out.
    keys = None if keys is None else keys.contiguous()
    inputs = [grad_y.contiguous(), z.contiguous(), mean, rstd, weight.contiguous(), seed, keys]
    for launch in _backward_launches(inputs, outputs, rate, architecture(z.device), processors(z.device)):
        launch.start()
    return outputs


@layer_norm_backward.register_fake
def _(grad_y, z, mean, rstd, weight, bias, x_bias, seed, keys, rate, is_last):
    return _backward_outputs(z, weight, bias, x_bias, seed is not None and not is_last)


def _setup(ctx, inputs, output):
    # One tensor [R, H] is kept: the sum that was normalized, or x where that is x itself. Beside their sum x and the
    # residual are not needed, and y not at all: the normalized row is (z - mean) rstd. The mask is drawn again from
    # seed and keys. bias and x_bias are kept for their types and shapes.
    x, weight, bias, _, residual, x_bias, ctx.rate, seed, keys, ctx.is_last = inputs
    _, z, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)  # no zeros for z, mean and rstd, through which nothing flows back
    normalized = z if _is_sum(residual, x_bias, seed, ctx.is_last) else x
    ctx.save_for_backward(normalized, mean, rstd, weight, bias, x_bias, seed, keys)


def _backward(ctx, grad_y, *_):
    *_, x_bias, seed, _ = ctx.saved_tensors
    gradients = layer_norm_backward(grad_y, *ctx.saved_tensors, ctx.rate, ctx.is_last)
    grad_z, grad_x, grad_weight, grad_bias, grad_x_bias = gradients
    # Empty tensors stand for None, which an operator cannot return: they are told apart by what was given.
    return (
        grad_z if seed is None or ctx.is_last else grad_x,
        grad_weight,
        grad_bias,
        None,
        grad_z if ctx.has_residual else None,
        grad_x_bias if x_bias is not None else None,
        *[None] * 4,
    )


layer_norm_forward.register_autograd(_backward, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """Rows of 16K tokens in bfloat16: with every part, as the embedding has it, and x alone."""
    return [
        case
        for arch in ARCHITECTURES
        for hidden in HIDDEN_SIZES
        for name in ("residual, bias, dropout", "residual, dropout last", "plain")
        for case in _cases(hidden, name, arch)
    ]


def _cases(hidden: int, name: str, arch: int) -> list[CompileCase]:
    x, vector = meta(ROW_TOKENS, hidden, dtype=torch.bfloat16), meta(hidden, dtype=torch.bfloat16)
    residual = x if "residual" in name else None
    x_bias = vector if "bias" in name else None
    has_dropout, is_last = "dropout" in name, "last" in name
    seed = meta(1, dtype=torch.int64) if has_dropout else None
    keys = meta(ROW_TOKENS, dtype=torch.int64) if has_dropout else None
    rate = 0.1 if has_dropout else 0.0
    outputs = y, _, mean, rstd = _forward_outputs(x, residual is not None)
    forward = _forward_launch([x, residual, x_bias, vector, vector, seed, keys], outputs, 1e-5, rate, is_last, arch)
    gradients = _backward_outputs(x, vector, vector, x_bias, has_dropout and not is_last)
    inputs = [y, x, mean, rstd, vector, seed, keys]
    backward, columns = _backward_launches(inputs, gradients, rate, arch, PROCESSORS[arch])
    return [
        CompileCase(f"layer_norm forward, H {hidden}, {name}", forward, arch, max_registers=48),
        CompileCase(f"layer_norm backward, H {hidden}, {name}", backward, arch, max_registers=128),
        CompileCase(f"layer_norm column sums, H {hidden}, {name}", columns, arch, max_registers=64),
    ]
