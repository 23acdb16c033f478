"""Triton kernels of layer_norm: one row of H elements at a time, held in registers; FP32 inside, no atomics.

Legend: H hidden, R rows, G programs of backward; capitals are pointers. H is built into the code, so that divisions by
it and the mask of the lanes beyond it cost nothing; BLOCK is the power of two above it (see rows.py).
"""

from fused.dispatch import jit, tl
from fused.dropout import keep_mask_kernel


@jit
def _drop(x, seed, key, threshold, scale, BLOCK: tl.constexpr):
    """dropout(x) of the row [BLOCK] with this key; its own gradient too."""
    # The counters that keep_mask gets from layer_norm_ref: group of 8 columns, low and high half of the row's key, 0.
    group = tl.arange(0, BLOCK // 8)
    kept = keep_mask_kernel(seed, group, key.to(tl.int32), (key >> 32).to(tl.int32), 0, threshold)
    return tl.where(kept, x * scale, 0.0)


@jit(do_not_specialize_on_alignment=["Seed", "Keys"])
def forward_kernel(
    X, Residual,  # [R, H] contiguous; no residual: None, which leaves no code, as for all that can be absent
    XBias, Weight, Bias,  # [H], XBias or None
    Seed, Keys,  # [1], [R] int64, or None without dropout
    Y, Z,  # [R, H], written; Z None where X itself is normalized
    Mean, Rstd,  # [R] FP32, written
    eps,
    threshold, scale,  # see drop_threshold and keep_scale in dropout.py
    IS_LAST: tl.constexpr,  # whether dropout is of the result, in place of X
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: Y, the sum Z that was normalized, its mean and its reciprocal deviation. Grid (R)."""
    # Rows times H may pass 2^31.
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    at = row.to(tl.int64) * H + cols
    z = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    # 1. The sum, in the order of the formula: bias, dropout, residual. Every row reads the vectors: keep them in cache.
    if XBias is not None:
        z += tl.load(XBias + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if Seed is not None and not IS_LAST:
        z = _drop(z, tl.load(Seed), tl.load(Keys + row), threshold, scale, BLOCK)
    if Residual is not None:
        z += tl.load(Residual + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded for backward alone: forward goes on with the exact sum.
    if Z is not None:
        tl.store(Z + at, z.to(Z.dtype.element_ty), mask=inside)
    # 2. Mean first, then the squares around it: with the row in registers the second pass costs no reading, and unlike
    # the mean of squares less the square of the mean it does not cancel. Lanes beyond H are 0 - mean before the mask.
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


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["Seed", "Keys"])
def backward_kernel(
    GradY, Z,  # [R, H] contiguous; Z is X where that was normalized
    Mean, Rstd,  # [R] FP32
    Weight,  # [H]
    Seed, Keys,  # [1], [R] int64, or None without dropout
    GradZ, GradX,  # [R, H], written; GradX where x was dropped, else None: dropout, if any, was last
    Sums,  # [2 or 3, G, H] FP32, written
    rows,  # R
    threshold, scale,  # as in forward
    HAS_X_BIAS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows g, g + G, ...: GradZ, GradX and this program's column sums, of the gradients of weight, bias and, where
    HAS_X_BIAS, x_bias. Grid (G).

    With n the normalized row and w = weight GradY: GradZ = (w - mean(w) - n mean(w n)) rstd. The gradients of vectors
    are sums over all rows, in two passes: here each program adds up its rows in registers, column_kernel adds up the
    programs. So there are G rows of sums to write and read, not R, and no atomics.
    """
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    weight = tl.load(Weight + cols, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    x_bias_sum = tl.zeros([BLOCK], tl.float32)
    seed = tl.load(Seed) if Seed is not None else 0
    # Rows dealt out like cards, so that neighbouring programs read neighbouring rows; the next ones are fetched ahead.
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(row, tl.int64) * H + cols
        z = tl.load(Z + at, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(GradY + at, mask=inside, other=0.0).to(tl.float32)
        # Dropout of the result comes first on the way back; the mask is its own gradient.
        if Seed is not None and GradX is None:
            grad_y = _drop(grad_y, seed, tl.load(Keys + row), threshold, scale, BLOCK)
        rstd = tl.load(Rstd + row)
        # Lanes beyond H must not enter the means: weight is 0 there, and so is weighted.
        normal = tl.where(inside, (z - tl.load(Mean + row)) * rstd, 0.0)
        weighted = grad_y * weight
        along = tl.sum(weighted * normal, 0) / H
        grad = (weighted - normal * along - tl.sum(weighted, 0) / H) * rstd
        tl.store(GradZ + at, grad.to(GradZ.dtype.element_ty), mask=inside)
        # GradZ is the residual's gradient as it is; x's passes through dropout, and x_bias' is x's.
        if GradX is not None:
            grad = _drop(grad, seed, tl.load(Keys + row), threshold, scale, BLOCK)
            tl.store(GradX + at, grad.to(GradX.dtype.element_ty), mask=inside)
        weight_sum += grad_y * normal
        bias_sum += grad_y
        if HAS_X_BIAS:
            x_bias_sum += grad
    # Where x was not dropped, grad is that of z, and x_bias' too. One row of sums for each vector.
    part = tl.program_id(0).to(tl.int64) * H + cols
    every = tl.num_programs(0).to(tl.int64) * H
    tl.store(Sums + part, weight_sum, mask=inside)
    tl.store(Sums + every + part, bias_sum, mask=inside)
    if HAS_X_BIAS:
        tl.store(Sums + 2 * every + part, x_bias_sum, mask=inside)


@jit(do_not_specialize=["programs"])
def column_kernel(
    Sums,  # [2 or 3, G, H] FP32
    GradWeight, GradBias, GradXBias,  # [H], written; GradXBias or None
    programs,  # G
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over G, always in the same order. Grid (H / COLUMNS, 2 or 3), rounded up."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols[None, :] < H
    # ROWS running sums a column, which meet once at the end: a program is short of columns, not of rows.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        at = start + tl.arange(0, ROWS)[:, None]
        there = inside & (at < programs)
        total += tl.load(Sums + (which * programs + at).to(tl.int64) * H + cols[None, :], mask=there, other=0.0)
    # Three stores of which one is unmasked: pointers of different types cannot be chosen at run time.
    column = tl.sum(total, 0)
    tl.store(GradWeight + cols, column.to(GradWeight.dtype.element_ty), mask=(cols < H) & (which == 0))
    tl.store(GradBias + cols, column.to(GradBias.dtype.element_ty), mask=(cols < H) & (which == 1))
    if GradXBias is not None:
        tl.store(GradXBias + cols, column.to(GradXBias.dtype.element_ty), mask=(cols < H) & (which == 2))
