"""Triton kernels of softmax_dropout: one row of L scores at a time, held in registers; FP32 inside, no atomics.

A program keeps its head and query and walks through samples, so that it makes the bias of its row once.

Legend: n samples (`samples`), N heads of this rank, L positions of a sample, BLOCK the power of two above it (see
rows.py); capitals are pointers. L is an argument, as it changes from batch to batch: the code differs by BLOCK, and by
whether 16 divides L, without which no load is 128 bits wide.
"""

from fused.dispatch import jit, tl
from fused.dropout import keep_kernel

MASKED_SCORE = tl.constexpr(-1e30)  # operator.py's; a kernel reads globals only as constexpr


@jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["Seed", "Keys"])
def forward_kernel(
    Scores,  # [n, N, L, L] contiguous: q k^T, not scaled
    IsKey,  # [n, L] bool
    Distances, Cls,  # [N, width], [N, 2] of any float type
    Seed, Keys,  # [1], [n] int64, or None without dropout
    P, Dropped,  # [n, N, L, L], written; Dropped None without dropout
    samples, heads, first_head, width, L, scale, threshold, keep_scale,
    EACH: tl.constexpr,  # samples of a program
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Probabilities P and, where there is a seed, Dropped. Grid (N L, samples / EACH), rounded up."""
    head, query = tl.program_id(0) // L, tl.program_id(0) % L
    cols = tl.arange(0, BLOCK)
    inside = cols < L
    # The bias of (head, query) for all keys stays in registers for all samples. [CLS]: its column first, then its row,
    # which has the corner.
    reach = width // 2
    distance = tl.minimum(tl.maximum(cols - query, -reach), reach) + reach
    bias = tl.load(Distances + head * width + distance).to(tl.float32)
    bias = tl.where(cols == 0, tl.load(Cls + head * 2 + 1).to(tl.float32), bias)
    bias = tl.where(query == 0, tl.load(Cls + head * 2).to(tl.float32), bias)
    seed = tl.load(Seed) if Seed is not None else 0
    groups = tl.arange(0, BLOCK // 8)
    first = tl.program_id(1) * EACH
    for sample in tl.range(first, tl.minimum(first + EACH, samples), num_stages=STAGES):
        row = (sample * heads + head) * L + query
        at = row.to(tl.int64) * L + cols
        is_key = tl.load(IsKey + sample * L + cols, mask=inside, other=0)
        x = tl.load(Scores + at, mask=inside, other=0.0).to(tl.float32) * scale + bias
        # Two masks: a key that is not there gets a finite score, so that a row without any key stays free of NaN; lanes
        # beyond L must not count even then.
        x = tl.where(inside, tl.where(is_key != 0, x, MASKED_SCORE), float("-inf"))
        x = tl.exp(x - tl.max(x, 0))
        p = x / tl.sum(x, 0)
        # P goes out too: with it and the mask drawn again, backward needs neither scores nor what was dropped.
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)
        if Seed is not None:
            kept = keep_kernel(seed, tl.load(Keys + sample), first_head + head, query, groups, threshold)
            tl.store(Dropped + at, tl.where(kept, p * keep_scale, 0.0).to(Dropped.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["Seed", "Keys"])
def backward_kernel(
    GradOut, P,  # [n, N, L, L] contiguous
    IsKey,  # [n, L] bool
    Seed, Keys,  # [1], [n] int64, or None without dropout
    GradScores,  # [n, N, L, L], written
    GradBias,  # [n / EACH, N, L, L] FP32, written: sums over a program's samples
    samples, heads, first_head, L, scale, threshold, keep_scale,
    EACH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """GradScores, and GradBias, its sums over a program's samples. Grid as forward's."""
    head, query = tl.program_id(0) // L, tl.program_id(0) % L
    cols = tl.arange(0, BLOCK)
    inside = cols < L
    total = tl.zeros([BLOCK], tl.float32)
    seed = tl.load(Seed) if Seed is not None else 0
    groups = tl.arange(0, BLOCK // 8)
    first = tl.program_id(1) * EACH
    for sample in tl.range(first, tl.minimum(first + EACH, samples), num_stages=STAGES):
        row = (sample * heads + head) * L + query
        at = row.to(tl.int64) * L + cols
        is_key = tl.load(IsKey + sample * L + cols, mask=inside, other=0)
        p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(GradOut + at, mask=inside, other=0.0).to(tl.float32)
        if Seed is not None:
            kept = keep_kernel(seed, tl.load(Keys + sample), first_head + head, query, groups, threshold)
            grad = tl.where(kept, grad * keep_scale, 0.0)
        # P (dP - sum of P dP), and nothing for what is no key, whose score was a constant.
        grad = tl.where(is_key != 0, p * (grad - tl.sum(p * grad, 0)), 0.0)
        tl.store(GradScores + at, (grad * scale).to(GradScores.dtype.element_ty), mask=inside)
        total += grad  # of the scaled scores with their bias, so without the scale
    part = (tl.program_id(1) * heads * L + tl.program_id(0)).to(tl.int64) * L + cols
    tl.store(GradBias + part, total, mask=inside)


@jit(do_not_specialize=["parts"])
def diagonal_kernel(
    GradBias,  # [parts, N, L, L] FP32: backward_kernel's
    Diagonals,  # [N, 2 L - 1] FP32, written
    parts, heads, L, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Diagonals: sums of GradBias over queries and keys other than [CLS] at distance
    key - query = entry - (L - 1), always in the same order. Grid (2 L / COLUMNS, N)."""
    head = tl.program_id(1)
    entry = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(parts):
        for start in range(1, L, ROWS):
            # ROWS queries by COLUMNS distances: neighbouring distances of a query are neighbouring keys in memory. From
            # query 1 and key 1 on: [CLS]'s row and column are summed apart.
            query = start + tl.arange(0, ROWS)[:, None]
            key = query + entry[None, :] - (L - 1)
            at = ((part * heads + head).to(tl.int64) * L + query) * L + key
            total += tl.load(GradBias + at, mask=(query < L) & (key > 0) & (key < L), other=0.0)
    tl.store(Diagonals + head * (2 * L - 1) + entry, tl.sum(total, 0), mask=entry < 2 * L - 1)
