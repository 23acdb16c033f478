"""Triton kernels of attention inside samples: forward, and backward by recomputation.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample, S side of the term, ROWS x COLS a
tile of scores (queries by keys). Capitals are pointers, or constants of the compilation where they say so. Token i of
sample b is row begin[b] + i * stride: positions inside a sample are what tiles, bias and dropout count.

The scheme is FlashAttention-2's (Dao, 2023): no score leaves the chip. For a tile of queries, forward walks along the
keys with an online softmax and keeps one number a query, the log-sum-exp. Backward makes the probabilities again from
it, in two kernels: query_kernel owns queries and walks along keys, key_kernel owns keys and walks along queries. That
is 7 products where one kernel would need 5, but then each number has one owner and needs no atomics, so that results
repeat bit for bit. term_kernel, for full TUPE alone, owns a tile of the term and walks along samples.

Scores, softmax and sums are FP32. exp(s - x) is exp2(s log2(e) - x log2(e)): exp2 is one instruction, and so are
product and difference together, written as fma or joined by the compiler: by registers. x is in units of log(2).
"""

from fused.dispatch import INTERPRETED, jit, tl
from fused.dropout import keep_kernel

LOG2E = tl.constexpr(1.4426950408889634)  # 1 / log(2)

UNALIGNED = ("Begin", "Length", "Seed", "Keys", "stride")
"""Arguments of which no kernel has a variant for those that 16 divides: it would be compiled in the middle of a run,
and reads no faster. term_len keeps its variant, without which the term's spill: give sides that 16 divides."""


@jit
def _dot(a, b):
    """The interpreter multiplies the raw bits of bfloat16, so it gets FP32."""
    # "ieee" is for FP32 inputs, whose products would else be TF32's with 10 bits; half precision has one way only.
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _tile(Pointer, begin, stride, positions, length, head, stride_t, stride_n, K: tl.constexpr):
    """Rows `positions` of one head of a sample, [positions, K], from [T, N, K]; rows past its length are 0.

    stride_t and stride_n: elements from a token to the next and from a head to the next. K is contiguous.
    """
    # int64, as T N K may pass 2^31. Zeros, not whatever lies there: 0 times a NaN of a neighbour would be NaN.
    token = begin + positions.to(tl.int64) * stride
    at = token[:, None] * stride_t + head * stride_n + tl.arange(0, K)[None, :]
    return tl.load(Pointer + at, mask=positions[:, None] < length, other=0.0)


@jit
def _store_tile(Pointer, value, begin, stride, positions, length, head, stride_t, stride_n, K: tl.constexpr):
    """value [positions, K] to where _tile reads, in the dtype there; rows past the length belong to others."""
    token = begin + positions.to(tl.int64) * stride
    at = token[:, None] * stride_t + head * stride_n + tl.arange(0, K)[None, :]
    tl.store(Pointer + at, value.to(Pointer.dtype.element_ty), mask=positions[:, None] < length)


@jit
def _vector(Pointer, begin, stride, positions, length, head, heads, other):
    """Numbers of `positions` of one head of a sample from contiguous [T, N]."""
    token = begin + positions.to(tl.int64) * stride
    return tl.load(Pointer + token * heads + head, mask=positions < length, other=other)


@jit
def _biased(scores, rows, cols, length, Distances, Cls, Term, head, width, term_len):
    """Scaled scores with bias and term, -inf for keys past the sample; rows and cols broadcast to their shape.

    What is None is absent: comparisons with None are decided when the kernel is compiled and leave no code.
    """
    if Distances is not None:
        # The bias is read by distance out of a table of at most 2 L - 1 numbers a head, which caches hold; distances
        # beyond its ends read the ends. No mask: the clamped index is always inside. In a loop of 2 stages the compiler
        # fetches it ahead like the keys, through 4 ROWS COLS bytes of shared memory a stage, most of forward_kernel's.
        reach = width // 2
        distance = tl.minimum(tl.maximum(cols - rows, -reach), reach) + reach
        bias = tl.load(Distances + head * width + distance).to(tl.float32)
        if Cls is not None:
            # The column of [CLS] first, then its row, which has the corner.
            bias = tl.where(cols == 0, tl.load(Cls + head * 2 + 1).to(tl.float32), bias)
            bias = tl.where(rows == 0, tl.load(Cls + head * 2).to(tl.float32), bias)
        scores += bias
    if Term is not None:
        first = Term + head.to(tl.int64) * term_len * term_len
        # The term may be larger than the sample and never smaller (S >= L), so that the sample's length bounds it.
        inside = (rows < length) & (cols < length)
        scores += tl.load(first + rows * term_len + cols, mask=inside, other=0.0).to(tl.float32)
    # Key 0 exists in every sample that has a tile: no row of the first tile is -inf throughout, whose softmax was NaN.
    return tl.where(cols < length, scores, float("-inf"))


@jit(do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    Q, K_, V,  # [T, N, K], strides below, K contiguous: slices of one projection's [T, N, 3, K] need no copy
    Distances, Cls,  # [N, width], [N, 2]: the bias by distance, and of [CLS]'s row and column; Cls is None where
    # position 0 is like all others, both are None without a bias
    Term,  # [N, term_len, term_len] or None
    Begin, Length,  # [n] int64, [n] int32: first token and number of tokens of each sample
    Seed, Keys,  # [1], [n] int64, or None without dropout
    Out, Lse,  # [T, N, K], [T, N] FP32, contiguous, written where a token belongs to a sample
    q_t, q_n, k_t, k_n, v_t, v_n,  # elements from token to token and from head to head of Q, K_, V
    stride,  # tokens from a sample's token to its next: 1 in packed rows, B in rows [S, B]
    heads,  # N
    first_head,  # of this rank: masks count heads over all ranks
    width, term_len,  # see Distances and Term
    scale,  # 1 / sqrt(K)
    threshold, keep_scale,  # see drop_threshold and keep_scale in dropout.py
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one (sample, head): Out and Lse. Grid (L / ROWS, N, n), rounded up.

    The other kernels take the same arguments and add what they read and write.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # The grid is cut for the longest sample, known on the host; programs behind a shorter one's end leave at once.
    if tl.program_id(0) * ROWS < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        # The queries stay for the whole walk; keys and values pass by.
        q = _tile(Q, begin, stride, rows, length, head, q_t, q_n, K)
        # Online softmax: the largest score so far in units of log(2), and the sums of exp(score - top) and of the
        # values weighted by it.
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, K], tl.float32)
        for start in range(0, length, COLS):
            cols = start + tl.arange(0, COLS)
            k = _tile(K_, begin, stride, cols, length, head, k_t, k_n, K)
            s = _dot(q, tl.trans(k)) * scale
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            # Where this tile has a larger score, what was summed so far shrinks to it; at first by exp2(-inf) = 0.
            new_top = tl.maximum(top, tl.max(s, 1) * LOG2E)
            p = tl.exp2(tl.fma(s, LOG2E, -new_top[:, None]))
            shrink = tl.exp2(top - new_top)
            # The denominator before dropout: probabilities are dropped after softmax, and those that stay do not grow
            # to fill the gap.
            total = total * shrink + tl.sum(p, 1)
            if Seed is not None:
                groups = start // 8 + tl.arange(0, COLS // 8)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                p = tl.where(kept, p, 0.0)
            # Rounded to the values' type for the matrix units: at most 1 as they are relative to the top, so that FP16
            # cannot overflow. The sums stay FP32.
            v = _tile(V, begin, stride, cols, length, head, v_t, v_n, K)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new_top
        # One quotient a query at the end instead of one a score, and dropout's factor with it.
        _store_tile(Out, acc * (keep_scale / total)[:, None], begin, stride, rows, length, head, heads * K, K, K)
        token = begin + rows.to(tl.int64) * stride
        # log(sum of exp) of the undropped scores: all that backward needs for the probabilities.
        tl.store(Lse + token * heads + head, (top + tl.log2(total)) / LOG2E, mask=rows < length)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def query_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys,  # as forward's; GradOut as Out
    Out,  # [T, N, K]: forward's
    Delta,  # [T, N] FP32, written for the kernels after this one
    GradQ,  # slice of the gradient [T, N, 3, K] of q, k and v together, contiguous, written
    Diagonals,  # [n, parts, N, slots] FP32, written where there are scores: for the gradient of Distances, or None
    ClsSums,  # [n, L / ROWS, N, 2] FP32, likewise: for that of Cls, or None
    q_t, q_n, k_t, k_n, v_t, v_n, stride, heads, first_head, width, term_len, scale, threshold, keep_scale,
    slots,  # (parts + 1) COLS, with parts = PARTS L / ROWS
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, its private sums for the bias, and Delta. Grid (L / ROWS, N, n), rounded up.

    With P the probabilities, M dropout's mask with its factor (products of a score's own numbers are written P M) and
    dP = M (GradOut V^T): the gradient of a score is P (dP - Delta), where Delta is a row's sum of P dP.

    The gradient of Distances is the sum of score gradients along each diagonal key - query = constant. ROWS is PARTS
    times COLS, so that a tile is PARTS squares one above the other; square t of all queries begins at query t COLS. In
    Diagonals, slot s of part t sums distance s - t COLS - (COLS - 1): a part's squares, from left to right, fill its
    slots from left to right. Row i of a square is turned left by i + 1, which stacks each diagonal in a column:

        square   a0 a1 a2      turned   a1 a2|a0     wrapped (right of |): distances -2, -1, 0 in columns 0, 1, 2
                 b0 b1 b2               b2|b0 b1     others: distances 1, 2 in columns 0, 1, which are distances
                 c0 c1 c2              |c0 c1 c2     -2, -1 of the next square and wait there for its lower half

    The sums of the upper half are carried to the next square; so each slot is written once, without atomics. Without
    Distances there are neither Diagonals nor ClsSums; without Cls no ClsSums, and position 0 belongs to the diagonals.
    """
    PARTS: tl.constexpr = ROWS // COLS
    tile, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    rows = tile * ROWS + tl.arange(0, ROWS)
    if tile * ROWS < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        # Delta needs no pass over the keys: a row's sum of P dP is GradOut . ((P M) V), and (P M) V is Out.
        go = _tile(GradOut, begin, stride, rows, length, head, heads * K, K, K)
        out = _tile(Out, begin, stride, rows, length, head, heads * K, K, K)
        delta = tl.sum(go.to(tl.float32) * out.to(tl.float32), 1)
        token = begin + rows.to(tl.int64) * stride
        tl.store(Delta + token * heads + head, delta, mask=rows < length)
        q = _tile(Q, begin, stride, rows, length, head, q_t, q_n, K)
        # inf for queries past the sample: all their probabilities become 0, whatever their scores.
        lse = _vector(Lse, begin, stride, rows, length, head, heads, float("inf")) * LOG2E
        grad_q = tl.zeros([ROWS, K], tl.float32)
        local = tl.arange(0, COLS)
        if Distances is not None:
            carry = tl.zeros([PARTS, COLS], tl.float32)
            # Memory of this program alone, PARTS rows of slots.
            part = sample * tl.num_programs(0) * PARTS + tile * PARTS + tl.arange(0, PARTS)
            sums = Diagonals + (part.to(tl.int64)[:, None] * heads + head) * slots + local[None, :]
            # i + j + 1: modulo COLS, the column that row i of a turned square has at j; the ones give three dimensions.
            turned = local[None, :, None] + local[None, None, :] + tl.full([PARTS, COLS, COLS], 1, tl.int32)
        if Cls is not None:
            first_row = tl.zeros([ROWS], tl.float32)
            first_col = tl.zeros([ROWS], tl.float32)
        for start in range(0, length, COLS):
            cols = start + local
            k = _tile(K_, begin, stride, cols, length, head, k_t, k_n, K)
            v = _tile(V, begin, stride, cols, length, head, v_t, v_n, K)
            s = _dot(q, tl.trans(k)) * scale
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            # Gradient of the probabilities before dropout: what was dropped gets none. The mask is drawn again.
            dp = _dot(go, tl.trans(v))
            if Seed is not None:
                groups = start // 8 + tl.arange(0, COLS // 8)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = tl.exp2(tl.fma(s, LOG2E, -lse[:, None])) * (dp - delta[:, None])
            grad_q += _dot(ds.to(k.dtype), k)
            if Cls is not None:
                # [CLS]'s row and column have numbers of their own: sums for these, and no part in the diagonals. Kept
                # as a sum for each query, so that threads meet once, behind the loop.
                in_row = rows[:, None] == 0
                in_col = (cols[None, :] == 0) & (rows[:, None] > 0)
                first_row += tl.sum(tl.where(in_row, ds, 0.0), 1)
                first_col += tl.sum(tl.where(in_col, ds, 0.0), 1)
                ds = tl.where(in_row | in_col, 0.0, ds)
            if Distances is not None:
                # FP32 ds, before its rounding. Wrapped ones complete the slots that begin at this square; the others
                # of the square before are in carry.
                squares = tl.reshape(ds, [PARTS, COLS, COLS])
                stacked = tl.gather(squares, turned % COLS, 2)
                tl.store(sums + start, carry + tl.sum(tl.where(turned >= COLS, stacked, 0.0), 1))
                carry = tl.sum(tl.where(turned >= COLS, 0.0, stacked), 1)
        if Distances is not None:
            # The upper half of the last square has no next one.
            tl.store(sums + tl.cdiv(length, COLS) * COLS, carry)
        if Cls is not None:
            at = ClsSums + ((sample.to(tl.int64) * tl.num_programs(0) + tile) * heads + head) * 2
            tl.store(at, tl.sum(first_row, 0))
            tl.store(at + 1, tl.sum(first_col, 0))
        # Scores are scale q k^T: one factor at the end instead of one a score.
        _store_tile(GradQ, grad_q * scale, begin, stride, rows, length, head, heads * 3 * K, 3 * K, K)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def key_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys,  # as forward's; GradOut as Out
    Delta,  # [T, N] FP32: query_kernel's, which must have run
    GradK, GradV,  # slices as GradQ
    q_t, q_n, k_t, k_n, v_t, v_n, stride, heads, first_head, width, term_len, scale, threshold, keep_scale,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, in a walk along the queries. Grid (L / COLS, N, n), rounded up.

    GradV = (P M)^T GradOut and GradK = scale (P (dP - Delta))^T Q, in query_kernel's letters.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    begin, length = tl.load(Begin + sample), tl.load(Length + sample)
    first = tl.program_id(0) * COLS
    cols = first + tl.arange(0, COLS)
    if first < length:
        seed = tl.load(Seed) if Seed is not None else 0
        name = tl.load(Keys + sample) if Seed is not None else 0
        # The keys' groups stay the same here; the queries change from tile to tile.
        groups = first // 8 + tl.arange(0, COLS // 8)
        k = _tile(K_, begin, stride, cols, length, head, k_t, k_n, K)
        v = _tile(V, begin, stride, cols, length, head, v_t, v_n, K)
        grad_k = tl.zeros([COLS, K], tl.float32)
        grad_v = tl.zeros([COLS, K], tl.float32)
        for start in range(0, length, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = _tile(Q, begin, stride, rows, length, head, q_t, q_n, K)
            go = _tile(GradOut, begin, stride, rows, length, head, heads * K, K, K)
            lse = _vector(Lse, begin, stride, rows, length, head, heads, float("inf")) * LOG2E
            delta = _vector(Delta, begin, stride, rows, length, head, heads, 0.0)
            s = _dot(q, tl.trans(k)) * scale
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            # The same expressions as in query_kernel, so that both kernels see the same probabilities.
            p = tl.exp2(s * LOG2E - lse[:, None])
            dp = _dot(go, tl.trans(v))
            # Two uses of P: the values were weighted with the dropped ones, the gradient of scores has those before.
            dropped = p
            if Seed is not None:
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dropped = tl.where(kept, p, 0.0)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            grad_v += _dot(tl.trans(dropped.to(go.dtype)), go)
            grad_k += _dot(tl.trans((p * (dp - delta[:, None])).to(q.dtype)), q)
        _store_tile(GradK, grad_k * scale, begin, stride, cols, length, head, heads * 3 * K, 3 * K, K)
        # dropped lacks dropout's factor, which is the same for all: once a number here.
        _store_tile(GradV, grad_v * keep_scale, begin, stride, cols, length, head, heads * 3 * K, 3 * K, K)


@jit(do_not_specialize=["samples", "tiles"], do_not_specialize_on_alignment=UNALIGNED)
def bias_kernel(
    Diagonals, ClsSums,  # query_kernel's
    Length,
    GradDistances, GradCls,  # [N, width] written everywhere, [N, 2] or None
    heads, width, tiles, slots,  # tiles: L / ROWS
    samples,  # n
    ROWS: tl.constexpr, COLS: tl.constexpr,  # query_kernel's
    LINES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES gradients of one head's Distances, and with the first ones those of Cls. Grid (width / ENTRIES, N).

    A line is one part of one sample, whose slots stand where query_kernel put them; LINES of them are added at a time,
    always in this order. Tiles past a sample's end wrote nothing, and distances beyond the table add up at its ends.
    """
    PARTS: tl.constexpr = ROWS // COLS
    head, first = tl.program_id(1), tl.program_id(0) * ENTRIES
    parts = tiles * PARTS
    # Programs that have an end of the table look at all slots.
    beyond = tl.where((first == 0) | (first + ENTRIES >= width), slots, 0)
    entry = first + tl.arange(0, ENTRIES)
    total = tl.zeros([LINES, ENTRIES], tl.float32)
    below = tl.zeros([LINES], tl.float32)
    above = tl.zeros([LINES], tl.float32)
    for start in range(0, samples * parts, LINES):
        line = start + tl.arange(0, LINES)
        sample, part = line // parts, line % parts
        length = tl.load(Length + sample, mask=sample < samples, other=0)
        written = tl.where(part // PARTS * ROWS < length, (tl.cdiv(length, COLS) + 1) * COLS, 0)[:, None]
        sums = Diagonals + ((line.to(tl.int64) * heads + head) * slots)[:, None]
        lowest = (part * COLS + COLS - 1 - width // 2)[:, None]  # slot of the table's first distance
        slot = lowest + entry[None, :]
        inside = (slot >= 0) & (slot < written) & (entry < width)[None, :]
        total += tl.load(sums + slot, mask=inside, other=0.0)
        for near in range(0, beyond, ENTRIES):
            any_slot = near + tl.arange(0, ENTRIES)[None, :]
            is_below, is_above = any_slot < lowest, any_slot >= lowest + width
            value = tl.load(sums + any_slot, mask=(is_below | is_above) & (any_slot < written), other=0.0)
            below += tl.sum(tl.where(is_below, value, 0.0), 1)
            above += tl.sum(tl.where(is_above, value, 0.0), 1)
    column = tl.sum(total, 0)
    column += tl.where(entry == 0, tl.sum(below, 0), 0.0) + tl.where(entry == width - 1, tl.sum(above, 0), 0.0)
    tl.store(GradDistances + head * width + entry, column.to(GradDistances.dtype.element_ty), mask=entry < width)
    if GradCls is not None:
        row = tl.zeros([LINES], tl.float32)
        col = tl.zeros([LINES], tl.float32)
        for start in range(0, tl.where(first == 0, samples * tiles, 0), LINES):
            line = start + tl.arange(0, LINES)
            sample = line // tiles
            length = tl.load(Length + sample, mask=sample < samples, other=0)
            at = ClsSums + (line.to(tl.int64) * heads + head) * 2
            row += tl.load(at, mask=line % tiles * ROWS < length, other=0.0)
            col += tl.load(at + 1, mask=line % tiles * ROWS < length, other=0.0)
        tl.store(GradCls + head * 2, tl.sum(row, 0).to(GradCls.dtype.element_ty), mask=first == 0)
        tl.store(GradCls + head * 2 + 1, tl.sum(col, 0).to(GradCls.dtype.element_ty), mask=first == 0)


@jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=UNALIGNED)
def term_kernel(
    Q, K_, V, GradOut, Lse, Distances, Cls, Term, Begin, Length, Seed, Keys,  # as forward's; GradOut as Out
    Delta,  # [T, N] FP32: query_kernel's
    GradTerm,  # [N, term_len, term_len], written everywhere
    q_t, q_n, k_t, k_n, v_t, v_n, stride, heads, first_head, width, term_len, scale, threshold, keep_scale,
    samples,  # n
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the additive term. Grid (S / ROWS, S / COLS, N), rounded up.

    Every sample adds to the same numbers: one program adds them all, in the order of the samples, where a grid over
    samples would need atomics or n copies of the term.
    """
    head = tl.program_id(2)
    first_row, first_col = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    groups = first_col // 8 + tl.arange(0, COLS // 8)
    seed = tl.load(Seed) if Seed is not None else 0
    total = tl.zeros([ROWS, COLS], tl.float32)
    for sample in range(samples):
        begin, length = tl.load(Begin + sample), tl.load(Length + sample)
        # Shorter samples do not reach this tile and add nothing.
        if (first_row < length) & (first_col < length):
            q = _tile(Q, begin, stride, rows, length, head, q_t, q_n, K)
            k = _tile(K_, begin, stride, cols, length, head, k_t, k_n, K)
            s = _dot(q, tl.trans(k)) * scale
            s = _biased(s, rows[:, None], cols[None, :], length, Distances, Cls, Term, head, width, term_len)
            lse = _vector(Lse, begin, stride, rows, length, head, heads, float("inf")) * LOG2E
            p = tl.exp2(tl.fma(s, LOG2E, -lse[:, None]))
            go = _tile(GradOut, begin, stride, rows, length, head, heads * K, K, K)
            v = _tile(V, begin, stride, cols, length, head, v_t, v_n, K)
            dp = _dot(go, tl.trans(v))
            if Seed is not None:
                name = tl.load(Keys + sample)
                kept = keep_kernel(seed, name, first_head + head, rows[:, None], groups[None, :], threshold)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            total += p * (dp - _vector(Delta, begin, stride, rows, length, head, heads, 0.0)[:, None])
    at = rows[:, None] * term_len + cols[None, :]
    inside = (rows[:, None] < term_len) & (cols[None, :] < term_len)
    tl.store(GradTerm + head.to(tl.int64) * term_len * term_len + at, total, mask=inside)
