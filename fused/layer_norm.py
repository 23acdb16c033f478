"""LayerNorm of a residual stream: LN(residual + dropout(x + x_bias)), any part absent; FP32 inside.

Legend: H hidden, R rows, G programs of the backward kernel. The dropout mask is a function of (seed, row, column)
and is drawn again in backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fused.ahead_of_time import ARCHITECTURES, HIDDEN_SIZES, PROCESSORS, ROW_TOKENS, CompileCase, meta
from fused.dispatch import Launch, architecture, processors, use_kernel
from fused.layer_norm_kernels import backward_kernel, column_kernel, forward_kernel
from fused.philox import check_dropout, drop_threshold, keep_mask, keep_scale, seed_of
from fused.rows import row_block, row_stages, row_warps

WIDEST = 16_384
"""Largest H of the kernels: a program holds a row in registers. Backward spills some of them above 4,096."""

FORWARD_ELEMENTS = {80: 16, 90: 16}
BACKWARD_ELEMENTS = {80: 8, 90: 8}
"""Elements of a row in each thread, by architecture; 8 are one 128-bit load of half precision. Chosen so that compiled
kernels keep to about 40 and 100 registers, not by measurement on a GPU."""

WARPS_PER_PROCESSOR = {80: 16, 90: 16}
"""Of backward, whose programs stay for the whole run: as many as its registers allow at once. Each leaves a row of
column sums, so that fewer mean less to add up. Not measured on a GPU."""

COLUMN_TILE = (256, 16)
"""Rows and columns that a program adds up at a time. Not measured on a GPU."""


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)) over the last dimension of x [..., H], in x's dtype.

    weight, bias, x_bias [H]; residual as x. dropout is a rate, rounded to 2^-16; seed [1] int64 on x's device, None
    draws one from the device's generator, as torch's dropout does. Gradients reach all five tensors. Raises
    ValueError for shapes, types and devices that do not fit; reads no tensor on a GPU.
    """
    _check(x, weight, bias, residual, x_bias)
    check_dropout(dropout, seed, x.device)
    seed = seed_of(dropout, seed, x.device)
    if not use_kernel("layer_norm", x):
        return layer_norm_ref(x, weight, bias, eps, residual=residual, x_bias=x_bias, dropout=dropout, seed=seed)
    if x.size(-1) > WIDEST:
        raise ValueError(f"x is {list(x.shape)}; the kernels take rows of at most {WIDEST}, reference_only() any")
    return layer_norm_forward(x, weight, bias, eps, residual, x_bias, dropout, seed)[0]


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What layer_norm computes, in plain torch; half precision in FP32, float64 in float64. Dropout needs a seed."""
    inner = torch.promote_types(x.dtype, torch.float32)
    z = x.to(inner)
    if x_bias is not None:
        z = z + x_bias.to(inner)
    if dropout > 0.0:
        assert seed is not None
        threshold = drop_threshold(dropout)
        rows = torch.arange(x.shape[:-1].numel(), device=x.device)
        z = z * keep_mask(seed, threshold, x.size(-1), rows).view(x.shape) * keep_scale(threshold)
    if residual is not None:
        z = z + residual.to(inner)
    return functional.layer_norm(z, weight.shape, weight.to(inner), bias.to(inner), eps).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> None:
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


def _forward_outputs(x: Tensor, is_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z (empty where x itself is normalized), mean, rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape if is_sum else 0), mean, rstd


def _forward_launch(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], eps: float, dropout: float, arch: int
) -> Launch:
    """inputs: x, residual, x_bias, weight, bias, seed; outputs: those of _forward_outputs."""
    (x, residual, x_bias, weight, bias, seed), (y, z, mean, rstd) = inputs, outputs
    threshold, hidden = drop_threshold(dropout), y.size(-1)
    arguments = {
        "X": x, "Residual": residual, "XBias": x_bias, "Weight": weight, "Bias": bias, "Seed": seed,
        "Y": y, "Z": z if z.numel() else None, "Mean": mean, "Rstd": rstd,
        "eps": eps, "threshold": threshold, "scale": keep_scale(threshold), "H": hidden, "BLOCK": row_block(hidden),
    }  # fmt: skip
    return Launch(forward_kernel, (mean.numel(),), arguments, row_warps(hidden, FORWARD_ELEMENTS[arch]))


@torch.library.custom_op("fused::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, x_bias: Tensor | None,
    dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y; the sum that was normalized, empty where it is x; its mean and reciprocal deviation. seed None: no dropout."""
    inputs = [None if one is None else one.contiguous() for one in (x, residual, x_bias, weight, bias, seed)]
    outputs = _forward_outputs(x, _is_sum(residual, x_bias, seed))
    _forward_launch(inputs, outputs, eps, dropout, architecture(x.device)).start()
    return outputs


def _is_sum(residual: Tensor | None, x_bias: Tensor | None, seed: Tensor | None) -> bool:
    return residual is not None or x_bias is not None or seed is not None


@layer_norm_forward.register_fake
def _(x, weight, bias, eps, residual, x_bias, dropout, seed):
    return _forward_outputs(x, _is_sum(residual, x_bias, seed))


def _backward_outputs(
    z: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, x (empty where it is that of z), weight, bias, x_bias (empty where there is none)."""
    grad_weight, grad_bias = (vector.new_empty(vector.shape) for vector in (weight, bias))
    grad_x_bias = z.new_empty(0) if x_bias is None else x_bias.new_empty(x_bias.shape)
    return z.new_empty(z.shape), z.new_empty(0 if seed is None else z.shape), grad_weight, grad_bias, grad_x_bias


def _backward_launches(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], dropout: float, arch: int, processors: int
) -> tuple[Launch, Launch]:
    """inputs: grad_y, z, mean, rstd, weight, seed; outputs: those of _backward_outputs."""
    (grad_y, z, mean, rstd, weight, seed), (grad_z, grad_x, grad_weight, grad_bias, grad_x_bias) = inputs, outputs
    rows, hidden = grad_z.numel() // grad_z.size(-1), grad_z.size(-1)
    threshold, warps = drop_threshold(dropout), row_warps(hidden, BACKWARD_ELEMENTS[arch])
    programs = max(1, min(rows, processors * max(1, WARPS_PER_PROCESSOR[arch] // warps)))
    has_x_bias = grad_x_bias.numel() > 0
    sums = grad_z.new_empty(2 + has_x_bias, programs, hidden, dtype=torch.float32)
    arguments = {
        "GradY": grad_y, "Z": z, "Mean": mean, "Rstd": rstd, "Weight": weight, "Seed": seed,
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
    dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of z, x (empty without dropout: that of z), weight, bias and x_bias (empty where there is none)."""
    outputs = _backward_outputs(z, weight, bias, x_bias, seed)
    inputs = [grad_y.contiguous(), z.contiguous(), mean, rstd, weight.contiguous(), seed]
    for launch in _backward_launches(inputs, outputs, dropout, architecture(z.device), processors(z.device)):
        launch.start()
    return outputs


@layer_norm_backward.register_fake
def _(grad_y, z, mean, rstd, weight, bias, x_bias, dropout, seed):
    return _backward_outputs(z, weight, bias, x_bias, seed)


def _setup(ctx, inputs, output):
    x, weight, bias, _, residual, x_bias, ctx.dropout, seed = inputs
    _, z, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z if _is_sum(residual, x_bias, seed) else x, mean, rstd, weight, bias, x_bias, seed)


def _backward(ctx, grad_y, *_):
    *saved, seed = ctx.saved_tensors
    grad_z, grad_x, grad_weight, grad_bias, grad_x_bias = layer_norm_backward(grad_y, *saved, ctx.dropout, seed)
    return (
        grad_z if seed is None else grad_x,
        grad_weight,
        grad_bias,
        None,
        grad_z if ctx.has_residual else None,
        grad_x_bias if saved[-1] is not None else None,
        None,
        None,
    )


layer_norm_forward.register_autograd(_backward, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """Rows of 16K tokens in bfloat16: with every part, and x alone."""
    return [
        case
        for arch in ARCHITECTURES
        for hidden in HIDDEN_SIZES
        for is_full in (True, False)
        for case in _cases(hidden, is_full, arch)
    ]


def _cases(hidden: int, is_full: bool, arch: int) -> list[CompileCase]:
    x, vector = meta(ROW_TOKENS, hidden, dtype=torch.bfloat16), meta(hidden, dtype=torch.bfloat16)
    residual, x_bias = (x, vector) if is_full else (None, None)
    dropout, seed = (0.1, meta(1, dtype=torch.int64)) if is_full else (0.0, None)
    outputs = y, _, mean, rstd = _forward_outputs(x, is_full)
    forward = _forward_launch([x, residual, x_bias, vector, vector, seed], outputs, 1e-5, dropout, arch)
    gradients = _backward_outputs(x, vector, vector, x_bias, seed)
    backward, columns = _backward_launches([y, x, mean, rstd, vector, seed], gradients, dropout, arch, PROCESSORS[arch])
    name = f"H {hidden}, " + ("residual, bias, dropout" if is_full else "plain")
    return [
        CompileCase(f"layer_norm forward, {name}", forward, arch, max_registers=48),
        CompileCase(f"layer_norm backward, {name}", backward, arch, max_registers=128),
        CompileCase(f"layer_norm column sums, {name}", columns, arch, max_registers=64),
    ]
