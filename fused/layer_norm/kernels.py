"""Triton kernels of layer_norm: one row of H elements at a time, held in registers; FP32 inside, no atomics."""

from fused.dispatch import jit, tl
from fused.dropout import keep_mask_kernel


@jit
def _drop(x, seed, key, threshold, scale, BLOCK: tl.constexpr):
    """dropout(x) of the row [BLOCK] with this key; its own gradient too."""
    group = tl.arange(0, BLOCK // 8)
    kept = keep_mask_kernel(seed, group, key.to(tl.int32), (key >> 32).to(tl.int32), 0, threshold)
    return tl.where(kept, x * scale, 0.0)


@jit
def forward_kernel(
    X, Residual, XBias, Weight, Bias, Seed, Keys, Y, Z, Mean, Rstd, eps, threshold, scale,
    IS_LAST: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: Y, the sum Z that was normalized (where it is not X itself), Mean and Rstd [R]. Grid (R)."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    at = row.to(tl.int64) * H + cols
    z = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if XBias is not None:
        z += tl.load(XBias + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if Seed is not None and not IS_LAST:
        z = _drop(z, tl.load(Seed), tl.load(Keys + row), threshold, scale, BLOCK)
    if Residual is not None:
        z += tl.load(Residual + at, mask=inside, other=0.0).to(tl.float32)
    if Z is not None:
        tl.store(Z + at, z.to(Z.dtype.element_ty), mask=inside)
    mean = tl.sum(z, 0) / H
    centered = tl.where(inside, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 0) / H + eps)
    weight = tl.load(Weight + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    bias = tl.load(Bias + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = centered * rstd * weight + bias
    if Seed is not None and IS_LAST:
        y = _drop(y, tl.load(Seed), tl.load(Keys + row), threshold, scale, BLOCK)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)


@jit
def backward_kernel(
    GradY, Z, Mean, Rstd, Weight, Seed, Keys, GradZ, GradX, Sums, rows, threshold, scale,
    HAS_X_BIAS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows g, g + G, ...: GradZ, GradX (where x was dropped; else dropout was last) and this program's column sums.

    Sums [2 or 3, G, H]: of the gradients of weight, bias and, where HAS_X_BIAS, x_bias. Grid (G).
    """
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    weight = tl.load(Weight + cols, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    x_bias_sum = tl.zeros([BLOCK], tl.float32)
    seed = tl.load(Seed) if Seed is not None else 0
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        at = tl.to_tensor(row).to(tl.int64) * H + cols
        z = tl.load(Z + at, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(GradY + at, mask=inside, other=0.0).to(tl.float32)
        if Seed is not None and GradX is None:
            grad_y = _drop(grad_y, seed, tl.load(Keys + row), threshold, scale, BLOCK)
        rstd = tl.load(Rstd + row)
        normal = tl.where(inside, (z - tl.load(Mean + row)) * rstd, 0.0)
        weighted = grad_y * weight
        along = tl.sum(weighted * normal, 0) / H
        grad = (weighted - normal * along - tl.sum(weighted, 0) / H) * rstd
        tl.store(GradZ + at, grad.to(GradZ.dtype.element_ty), mask=inside)
        if GradX is not None:
            grad = _drop(grad, seed, tl.load(Keys + row), threshold, scale, BLOCK)
            tl.store(GradX + at, grad.to(GradX.dtype.element_ty), mask=inside)
        weight_sum += grad_y * normal
        bias_sum += grad_y
        if HAS_X_BIAS:
            x_bias_sum += grad
    part = tl.program_id(0).to(tl.int64) * H + cols
    every = tl.num_programs(0).to(tl.int64) * H
    tl.store(Sums + part, weight_sum, mask=inside)
    tl.store(Sums + every + part, bias_sum, mask=inside)
    if HAS_X_BIAS:
        tl.store(Sums + 2 * every + part, x_bias_sum, mask=inside)


@jit
def column_kernel(Sums, GradWeight, GradBias, GradXBias, programs, H: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """Sums [2 or 3, G, H] over G, always in the same order. Grid (H / COLUMNS, 2 or 3)."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols[None, :] < H
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        there = inside & (at < programs)
        total += tl.load(Sums + (which * programs + at).to(tl.int64) * H + cols[None, :], mask=there, other=0.0)
    column = tl.sum(total, 0)
    tl.store(GradWeight + cols, column.to(GradWeight.dtype.element_ty), mask=(cols < H) & (which == 0))
    tl.store(GradBias + cols, column.to(GradBias.dtype.element_ty), mask=(cols < H) & (which == 1))
    if GradXBias is not None:
        tl.store(GradXBias + cols, column.to(GradXBias.dtype.element_ty), mask=(cols < H) & (which == 2))
