"""Triton kernels of softmax_dropout: one row of L scores at a time, held in registers; FP32 inside, no atomics.

A program keeps its head and query and walks through samples, so that it makes the bias of its row once.
"""

from fused.dispatch import jit, tl
from fused.dropout import keep_kernel

MASKED_SCORE = tl.constexpr(-1e30)


@jit
def forward_kernel(
    Scores, IsKey, Distances, Cls, Seed, Keys, P, Dropped, samples, heads, first_head, width, scale, threshold,
    keep_scale,
    EACH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Probabilities P and, where there is a seed, Dropped. Grid (N L, samples / EACH)."""
    head, query = tl.program_id(0) // L, tl.program_id(0) % L
    cols = tl.arange(0, BLOCK)
    inside = cols < L
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
        x = tl.where(inside, tl.where(is_key != 0, x, MASKED_SCORE), float("-inf"))
        x = tl.exp(x - tl.max(x, 0))
        p = x / tl.sum(x, 0)
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)
        if Seed is not None:
            kept = keep_kernel(seed, tl.load(Keys + sample), first_head + head, query, groups, threshold)
            tl.store(Dropped + at, tl.where(kept, p * keep_scale, 0.0).to(Dropped.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    GradOut, P, IsKey, Seed, Keys, GradScores, GradBias, samples, heads, first_head, scale, threshold, keep_scale,
    EACH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """GradScores, and GradBias [samples / EACH, N, L, L], its sums over a program's samples. Grid as forward's."""
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
        grad = tl.where(is_key != 0, p * (grad - tl.sum(p * grad, 0)), 0.0)
        tl.store(GradScores + at, (grad * scale).to(GradScores.dtype.element_ty), mask=inside)
        total += grad
    part = (tl.program_id(1) * heads * L + tl.program_id(0)).to(tl.int64) * L + cols
    tl.store(GradBias + part, total, mask=inside)


@jit
def diagonal_kernel(GradBias, Diagonals, parts, heads, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Diagonals [N, 2 L - 1]: sums of GradBias [parts, N, L, L] over queries and keys other than [CLS] at distance
    key - query = entry - (L - 1), always in the same order. Grid (2 L / COLUMNS, N)."""
    head = tl.program_id(1)
    entry = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(parts):
        for start in range(1, L, ROWS):
            query = start + tl.arange(0, ROWS)[:, None]
            key = query + entry[None, :] - (L - 1)
            at = ((part * heads + head).to(tl.int64) * L + query) * L + key
            total += tl.load(GradBias + at, mask=(query < L) & (key > 0) & (key < L), other=0.0)
    tl.store(Diagonals + head * (2 * L - 1) + entry, tl.sum(total, 0), mask=entry < 2 * L - 1)
