"""Triton kernels of attention inside samples: forward, and backward by recomputation.

Legend: T tokens, N heads, K head dimension, n samples, B side of a square tile. Token i of sample b is row
begin[b] + i * step. Scores, softmax and sums are FP32; no atomics, so results repeat bit for bit.
"""

import os

from fused.dispatch import jit, tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@jit
def _dot(a, b):
    """The interpreter multiplies the raw bits of bfloat16, so it gets FP32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@jit
def _tile(Pointer, begin, step, places, length, head, stride_t, stride_n, K: tl.constexpr):
    """Rows `places` of one head of a sample, [B, K]; rows past its length are 0."""
    token = begin + places.to(tl.int64) * step
    at = token[:, None] * stride_t + head * stride_n + tl.arange(0, K)[None, :]
    return tl.load(Pointer + at, mask=places[:, None] < length, other=0.0)


@jit
def _store_tile(Pointer, value, begin, step, places, length, head, heads, K: tl.constexpr):
    token = begin + places.to(tl.int64) * step
    at = (token[:, None] * heads + head) * K + tl.arange(0, K)[None, :]
    tl.store(Pointer + at, value.to(Pointer.dtype.element_ty), mask=places[:, None] < length)


@jit
def _scores(q, k, rows, cols, length, Distances, Cls, Term, head, width, term_len, scale, HAS_TERM: tl.constexpr):
    """Scaled scores with bias, [B, B]; -inf for keys past the sample."""
    reach = width // 2
    distance = tl.minimum(tl.maximum(cols[None, :] - rows[:, None], -reach), reach) + reach
    bias = tl.load(Distances + head * width + distance)
    bias = tl.where(cols[None, :] == 0, tl.load(Cls + head * 2 + 1), bias)
    bias = tl.where(rows[:, None] == 0, tl.load(Cls + head * 2), bias)
    scores = _dot(q, tl.trans(k)) * scale + bias
    if HAS_TERM:
        at = (head.to(tl.int64) * term_len + rows[:, None]) * term_len + cols[None, :]
        inside = (rows[:, None] < length) & (cols[None, :] < length)
        scores += tl.load(Term + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(cols[None, :] < length, scores, float("-inf"))


@jit
def _kept(seed, sample_key, head, rows, cols, threshold):
    """Dropout's mask [B, B], from seed, sample, global head, query and key alone."""
    places = (rows[:, None] << 16) | cols[None, :]
    zero = places * 0
    low = (sample_key & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = ((sample_key >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    bits, _, _, _ = tl.philox(seed, places, zero + head, zero + low, zero + high)
    return (bits >> 1).to(tl.int32) >= threshold


@jit
def forward_kernel(
    Q, K_, V, Distances, Cls, Term, Begin, Length, Key, Seed, Out, Lse,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, head_offset, width, term_len, scale, threshold, keep_scale,
    K: tl.constexpr, B: tl.constexpr, HAS_TERM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one (sample, head): Out [T, N, K] and Lse [T, N]. Grid (tiles, N, n)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    rows = tl.program_id(0) * B + tl.arange(0, B)
    if tl.program_id(0) * B < length:
        q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
        top = tl.full([B], float("-inf"), tl.float32)
        total = tl.zeros([B], tl.float32)
        acc = tl.zeros([B, K], tl.float32)
        for start in range(0, length, B):
            cols = start + tl.arange(0, B)
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            s = _scores(q, k, rows, cols, length, Distances, Cls, Term, head, width, term_len, scale, HAS_TERM)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            if DROP:
                kept = _kept(tl.load(Seed), tl.load(Key + sample), head_offset + head, rows, cols, threshold)
                p = tl.where(kept, p * keep_scale, 0.0)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new_top
        _store_tile(Out, acc / total[:, None], begin, step, rows, length, head, heads, K)
        token = begin + rows.to(tl.int64) * step
        tl.store(Lse + token * heads + head, top + tl.log(total), mask=rows < length)


@jit
def _gradient(q, k, v, go, lse, delta, rows, cols, length, head, Distances, Cls, Term, Seed, Key, sample,
              head_offset, width, term_len, scale, threshold, keep_scale,
              HAS_TERM: tl.constexpr, DROP: tl.constexpr):  # fmt: skip
    """Dropped probabilities and the gradient of the scores, both [B, B] and 0 outside the sample."""
    s = _scores(q, k, rows, cols, length, Distances, Cls, Term, head, width, term_len, scale, HAS_TERM)
    p = tl.where(rows[:, None] < length, tl.exp(s - lse[:, None]), 0.0)
    dp = _dot(go, tl.trans(v))
    dropped = p
    if DROP:
        kept = _kept(tl.load(Seed), tl.load(Key + sample), head_offset + head, rows, cols, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    return dropped, p * (dp - delta[:, None])


@jit
def query_kernel(
    Q, K_, V, GradOut, Lse, Delta, Distances, Cls, Term, Begin, Length, Key, Seed, GradQ, Diagonals, ClsSums,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, head_offset, width, term_len, scale, threshold, keep_scale, slots,
    K: tl.constexpr, B: tl.constexpr, HAS_TERM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and its private sums for the bias. Grid (tiles, N, n).

    Diagonals [n, tiles, N, slots]: slot s of tile t sums distance s - t B - (B - 1). Row i of a tile of score
    gradients is turned by i + 1, which stacks each diagonal in a column: places that wrapped are distances of
    the lower half, the others of the upper half, which the next tile's lower half completes.
    """
    tile, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    local = tl.arange(0, B)
    rows = tile * B + local
    if tile * B < length:
        token = begin + rows.to(tl.int64) * step
        q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
        go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
        lse = tl.load(Lse + token * heads + head, mask=rows < length, other=0.0)
        delta = tl.load(Delta + token * heads + head, mask=rows < length, other=0.0)
        grad_q = tl.zeros([B, K], tl.float32)
        carry = tl.zeros([B], tl.float32)
        first_row = tl.zeros([B], tl.float32)
        first_col = tl.zeros([B], tl.float32)
        slice_ = ((sample.to(tl.int64) * tl.num_programs(0) + tile) * heads + head) * slots
        turned = local[:, None] + local[None, :] + 1
        for start in range(0, length, B):
            cols = start + local
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            _, ds = _gradient(q, k, v, go, lse, delta, rows, cols, length, head, Distances, Cls, Term, Seed, Key,
                              sample, head_offset, width, term_len, scale, threshold, keep_scale,
                              HAS_TERM, DROP)  # fmt: skip
            grad_q += _dot(ds.to(k.dtype), k)
            in_row = rows[:, None] == 0
            in_col = (cols[None, :] == 0) & (rows[:, None] > 0)
            first_row += tl.sum(tl.where(in_row, ds, 0.0), 1)
            first_col += tl.sum(tl.where(in_col, ds, 0.0), 1)
            stacked = tl.gather(tl.where(in_row | in_col, 0.0, ds), turned % B, 1)
            tl.store(Diagonals + slice_ + cols, carry + tl.sum(tl.where(turned >= B, stacked, 0.0), 0))
            carry = tl.sum(tl.where(turned >= B, 0.0, stacked), 0)
        tl.store(Diagonals + slice_ + tl.cdiv(length, B) * B + local, carry)
        at = ClsSums + ((sample.to(tl.int64) * tl.num_programs(0) + tile) * heads + head) * 2
        tl.store(at, tl.sum(first_row, 0))
        tl.store(at + 1, tl.sum(first_col, 0))
        _store_tile(GradQ, grad_q * scale, begin, step, rows, length, head, heads, K)


@jit
def key_kernel(
    Q, K_, V, GradOut, Lse, Delta, Distances, Cls, Term, Begin, Length, Key, Seed, GradK, GradV,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, head_offset, width, term_len, scale, threshold, keep_scale,
    K: tl.constexpr, B: tl.constexpr, HAS_TERM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values. Grid (tiles, N, n)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    cols = tl.program_id(0) * B + tl.arange(0, B)
    if tl.program_id(0) * B < length:
        k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
        v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
        grad_k = tl.zeros([B, K], tl.float32)
        grad_v = tl.zeros([B, K], tl.float32)
        for start in range(0, length, B):
            rows = start + tl.arange(0, B)
            token = begin + rows.to(tl.int64) * step
            q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
            go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
            lse = tl.load(Lse + token * heads + head, mask=rows < length, other=0.0)
            delta = tl.load(Delta + token * heads + head, mask=rows < length, other=0.0)
            p, ds = _gradient(q, k, v, go, lse, delta, rows, cols, length, head, Distances, Cls, Term, Seed, Key,
                              sample, head_offset, width, term_len, scale, threshold, keep_scale,
                              HAS_TERM, DROP)  # fmt: skip
            grad_v += _dot(tl.trans(p.to(go.dtype)), go)
            grad_k += _dot(tl.trans(ds.to(q.dtype)), q)
        _store_tile(GradK, grad_k * scale, begin, step, cols, length, head, heads, K)
        _store_tile(GradV, grad_v, begin, step, cols, length, head, heads, K)


@jit
def term_kernel(
    Q, K_, V, GradOut, Lse, Delta, Distances, Cls, Term, Begin, Length, Key, Seed, GradTerm,
    q_t, q_n, k_t, k_n, v_t, v_n, step, heads, head_offset, width, term_len, scale, threshold, keep_scale, samples,
    K: tl.constexpr, B: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the additive term, summed over samples in their order. Grid (tiles, tiles, N)."""
    head = tl.program_id(2)
    rows = tl.program_id(0) * B + tl.arange(0, B)
    cols = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([B, B], tl.float32)
    for sample in range(samples):
        begin, length = tl.load(Begin + sample), tl.load(Length + sample)
        if (tl.program_id(0) * B < length) & (tl.program_id(1) * B < length):
            token = begin + rows.to(tl.int64) * step
            q = _tile(Q, begin, step, rows, length, head, q_t, q_n, K)
            go = _tile(GradOut, begin, step, rows, length, head, heads * K, K, K)
            k = _tile(K_, begin, step, cols, length, head, k_t, k_n, K)
            v = _tile(V, begin, step, cols, length, head, v_t, v_n, K)
            lse = tl.load(Lse + token * heads + head, mask=rows < length, other=0.0)
            delta = tl.load(Delta + token * heads + head, mask=rows < length, other=0.0)
            _, ds = _gradient(q, k, v, go, lse, delta, rows, cols, length, head, Distances, Cls, Term, Seed, Key,
                              sample, head_offset, width, term_len, scale, threshold, keep_scale,
                              True, DROP)  # fmt: skip
            total += ds
    at = (head.to(tl.int64) * term_len + rows[:, None]) * term_len + cols[None, :]
    tl.store(GradTerm + at, total, mask=(rows[:, None] < term_len) & (cols[None, :] < term_len))
