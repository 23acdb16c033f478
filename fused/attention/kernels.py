"""Triton kernels of attention inside samples: forward, and backward by recomputation.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample, S side of the term, ROWS x COLS a
tile of scores (queries by keys). Token i of sample b is row begin[b] + i * step. Scores, softmax and sums are FP32; no
atomics, so results repeat bit for bit. Scores are in units of log(2), and so are Distances and Cls: exp2 is one
instruction.
"""

from fused.attention.dropout import keep_kernel
from fused.dispatch import INTERPRETED, jit, tl

LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _dot(a, b):
    """The interpreter multiplies the raw bits of bfloat16, so it gets FP32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _tile(Pointer, begin, step, places, length, head, stride_t, stride_n, K: tl.constexpr):
    """Rows `places` of one head of a sample, [places, K]; rows past its length are 0."""
    token = begin + places.to(tl.int64) * step
    at = token[:, None] * stride_t + head * stride_n + tl.arange(0, K)[None, :]
    return tl.load(Pointer + at, mask=places[:, None] < length, other=0.0)


@jit
def _store_tile(Pointer, value, begin, step, places, length, head, heads, K: tl.constexpr):
    token = begin + places.to(tl.int64) * step
    at = (token[:, None] * heads + head) * K + tl.arange(0, K)[None, :]
    tl.store(Pointer + at, value.to(Pointer.dtype.element_ty), mask=places[:, None] < length)


@jit
def _vector(Pointer, begin, step, places, length, head, heads, other):
    """Numbers of `places` of one head of a sample from [T, N]."""
    token = begin + places.to(tl.int64) * step
    return tl.load(Pointer + token * heads + head, mask=places < length, other=other)


@jit
def _biased(scores, rows, cols, length, Distances, Cls, Term, head, width, term_len):
    """Scaled scores with bias and term, -inf for keys past the sample; rows and cols broadcast to their shape.

    What is None is absent: comparisons with None are decided when the kernel is compiled and leave no code.
    """
    if Distances is not None:
        reach = width // 2
        distance = tl.minimum(tl.maximum(cols - rows, -reach), reach) + reach
        bias = tl.load(Distances + head * width + distance)
        if Cls is not None:
            bias = tl.where(cols == 0, tl.load(Cls + head * 2 + 1), bias)
            bias = tl.where(rows == 0, tl.load(Cls + head * 2), bias)
        scores += bias
    if Term is not None:
        first = Term + head.to(tl.int64) * term_len * term_len
        inside = (rows < length) & (cols < length)
        scores += tl.load(first + rows * term_len + cols, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where(cols < length, scores, float("-inf"))


@jit
def forward_kernel(
    Q, K_, V, Distances, Cls, Term, Begin, Length, Seed, Keys, Out, Lse,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, first_head, width, term_len, scale, threshold, keep_scale,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one (sample, head): Out [T, N, K] and Lse [T, N]. Grid (L / ROWS, N, n)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, K], tl.float32)
        for start in range(0, length, COLS):
            cols = start + tl.arange(0, COLS)
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            s = _dot(q, tl.trans(k)) * (scale * LOG2E)
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            if Seed is not None:
                groups = start // 8 + tl.arange(0, COLS // 8)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                p = tl.where(kept, p, 0.0)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new_top
        _store_tile(Out, acc * (keep_scale / total)[:, None], begin, step, rows, length, head, heads, K)
        token = begin + rows.to(tl.int64) * step
        tl.store(Lse + token * heads + head, (top + tl.log2(total)) / LOG2E, mask=rows < length)


@jit
def query_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys,
    Out, GradLse, Delta, GradQ, Diagonals, ClsSums,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, first_head, width, term_len, scale, threshold, keep_scale, slots,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, its private sums for the bias, and Delta [T, N]. Grid (L / ROWS, N, n).

    Delta is the sum of a row's probabilities times their gradients, less the gradient of Lse; the kernels after this
    one read it. ROWS is PARTS times COLS; part t of all queries has COLS of them. Diagonals [n, parts, N, slots]: slot
    s of part t sums distance s - t COLS - (COLS - 1). Row i of a square of score gradients is turned by i + 1, which
    stacks each diagonal in a column: places that wrapped are distances of the lower half, the others of the upper
    half, which the next square's lower half completes. ClsSums [n, L / ROWS, N, 2]. Without Distances there is
    neither, without Cls no ClsSums, and position 0 belongs to the diagonals.
    """
    PARTS: tl.constexpr = ROWS // COLS
    tile, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    rows = tile * ROWS + tl.arange(0, ROWS)
    if tile * ROWS < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
        out = _tile(Out, begin, step, rows, length, head, heads * K, K, K)
        delta = tl.sum(go.to(tl.float32) * out.to(tl.float32), 1)
        if GradLse is not None:
            delta -= _vector(GradLse, begin, step, rows, length, head, heads, 0.0)
        token = begin + rows.to(tl.int64) * step
        tl.store(Delta + token * heads + head, delta, mask=rows < length)
        q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
        lse = _vector(Lse, begin, step, rows, length, head, heads, float("inf")) * LOG2E
        grad_q = tl.zeros([ROWS, K], tl.float32)
        local = tl.arange(0, COLS)
        if Distances is not None:
            carry = tl.zeros([PARTS, COLS], tl.float32)
            part = sample * tl.num_programs(0) * PARTS + tile * PARTS + tl.arange(0, PARTS)
            sums = Diagonals + (part.to(tl.int64)[:, None] * heads + head) * slots + local[None, :]
            turned = local[None, :, None] + local[None, None, :] + tl.full([PARTS, COLS, COLS], 1, tl.int32)
        if Cls is not None:
            first_row = tl.zeros([ROWS], tl.float32)
            first_col = tl.zeros([ROWS], tl.float32)
        for start in range(0, length, COLS):
            cols = start + local
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            s = _dot(q, tl.trans(k)) * (scale * LOG2E)
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            dp = _dot(go, tl.trans(v))
            if Seed is not None:
                groups = start // 8 + tl.arange(0, COLS // 8)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
            grad_q += _dot(ds.to(k.dtype), k)
            if Cls is not None:
                in_row = rows[:, None] == 0
                in_col = (cols[None, :] == 0) & (rows[:, None] > 0)
                first_row += tl.sum(tl.where(in_row, ds, 0.0), 1)
                first_col += tl.sum(tl.where(in_col, ds, 0.0), 1)
                ds = tl.where(in_row | in_col, 0.0, ds)
            if Distances is not None:
                squares = tl.reshape(ds, [PARTS, COLS, COLS])
                stacked = tl.gather(squares, turned % COLS, 2)
                tl.store(sums + start, carry + tl.sum(tl.where(turned >= COLS, stacked, 0.0), 1))
                carry = tl.sum(tl.where(turned >= COLS, 0.0, stacked), 1)
        if Distances is not None:
            tl.store(sums + tl.cdiv(length, COLS) * COLS, carry)
        if Cls is not None:
            at = ClsSums + ((sample.to(tl.int64) * tl.num_programs(0) + tile) * heads + head) * 2
            tl.store(at, tl.sum(first_row, 0))
            tl.store(at + 1, tl.sum(first_col, 0))
        _store_tile(GradQ, grad_q * scale, begin, step, rows, length, head, heads, K)


@jit
def key_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys, Delta, GradK, GradV,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, first_head, width, term_len, scale, threshold, keep_scale,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values. Grid (L / COLS, N, n)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    first = tl.program_id(0) * COLS
    cols = first + tl.arange(0, COLS)
    if first < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        groups = first // 8 + tl.arange(0, COLS // 8)
        k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
        v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
        grad_k = tl.zeros([COLS, K], tl.float32)
        grad_v = tl.zeros([COLS, K], tl.float32)
        for start in range(0, length, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
            go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
            lse = _vector(Lse, begin, step, rows, length, head, heads, float("inf")) * LOG2E
            delta = _vector(Delta, begin, step, rows, length, head, heads, 0.0)
            s = _dot(q, tl.trans(k)) * (scale * LOG2E)
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            p = tl.exp2(s - lse[:, None])
            dp = _dot(go, tl.trans(v))
            dropped = p
            if Seed is not None:
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dropped = tl.where(kept, p, 0.0)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            grad_v += _dot(tl.trans(dropped.to(go.dtype)), go)
            grad_k += _dot(tl.trans((p * (dp - delta[:, None])).to(q.dtype)), q)
        _store_tile(GradK, grad_k * scale, begin, step, cols, length, head, heads, K)
        _store_tile(GradV, grad_v * keep_scale, begin, step, cols, length, head, heads, K)


@jit
def term_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys, Delta, GradTerm,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, first_head, width, term_len, scale, threshold, keep_scale, samples,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the additive term, summed over samples in their order. Grid (S / ROWS, S / COLS, N)."""
    head = tl.program_id(2)
    first_row, first_col = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    groups = first_col // 8 + tl.arange(0, COLS // 8)
    seed = tl.load(Seed) if Seed is not None else 0
    total = tl.zeros([ROWS, COLS], tl.float32)
    for sample in range(samples):
        begin, length = tl.load(Begin + sample), tl.load(Length + sample)
        if (first_row < length) & (first_col < length):
            q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            s = _dot(q, tl.trans(k)) * (scale * LOG2E)
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            p = tl.exp2(s - (_vector(Lse, begin, step, rows, length, head, heads, float("inf")) * LOG2E)[:, None])
            go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            dp = _dot(go, tl.trans(v))
            if Seed is not None:
                name = tl.load(Keys + sample)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            total += p * (dp - _vector(Delta, begin, step, rows, length, head, heads, 0.0)[:, None])
    at = rows[:, None] * term_len + cols[None, :]
    inside = (rows[:, None] < term_len) & (cols[None, :] < term_len)
    tl.store(GradTerm + head.to(tl.int64) * term_len * term_len + at, total, mask=inside)
