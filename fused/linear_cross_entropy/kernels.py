"""Triton kernels on one chunk of logits: what a row's statistics need, and the gradient in place of the logits.

Legend: M rows, C ids of the chunk (`width`), of which the first `real` are not padding; capitals are pointers. Matrix
products are torch's: a product kernel with the noise in its epilogue needs all registers of a thread for its
accumulator and spills. FP32 inside; no atomics, so results repeat bit for bit.
"""

from fused.dispatch import INTERPRETED, jit, tl

NO_ID = tl.constexpr(-1e30)  # the reference's; a kernel reads globals only as constexpr


@jit
def _mix(x):
    """The avalanche of the reference's `_mix`, on uint32, whose shifts are logical without masks."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _uniform(first_key, second_key, ids):
    """(h + 1/2) 2^-32 of the reference's `hash32` for one row."""
    # Keys are int32 in memory, as torch has them; the same bits read as unsigned make products and shifts well defined.
    mixed = _mix((ids.to(tl.uint32) * 0x9E3779B9) ^ first_key.to(tl.uint32, bitcast=True))
    mixed = _mix(mixed ^ second_key.to(tl.uint32, bitcast=True))
    # Above 2^24 the conversion rounds, so that u can become 1: noise of -inf, which never wins.
    return (mixed.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32


@jit
def _gumbel(uniform):
    """The reference's `gumbel_noise`. The interpreter has no log1p and takes FP64 for it."""
    if INTERPRETED:
        return -tl.log(-tl.log(1.0 - uniform.to(tl.float64))).to(tl.float32)
    return -tl.extra.cuda.libdevice.log(-tl.extra.cuda.libdevice.log1p(-uniform))


@jit
def _rough(exponentials, uniform):
    """exponentials exp(gumbel) to a relative 2e-5, with the hardware's logarithm and division.

    exp(gumbel) is 1 / -log(1 - u): one logarithm where gumbel itself takes two, and the exponentials are there anyway.
    """
    complement = 1.0 - uniform
    log2 = tl.log2(complement) if INTERPRETED else tl.extra.cuda.libdevice.fast_log2f(complement)
    # u small, the largest noise, is what wins most often, and there 1 - u keeps few of u's bits and fast_log2f is off
    # by up to 2^-22 whatever its result. Below u = 2^-6 the series of -log(1 - u) to u^3 takes over: it lacks u^3 / 4
    # of its value, 1e-6 at most. At u = 2^-6 the logarithm is off by 2^-22 of 0.0227, 1e-5, and better above.
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333))
    inverse = tl.where(uniform < 0.015625, series, log2 * -0.6931472)  # 2^-6; -log(2)
    if INTERPRETED:
        return exponentials / inverse
    return tl.extra.cuda.libdevice.fast_dividef(exponentials, inverse)


@jit(do_not_specialize=["first", "num_rows"], do_not_specialize_on_alignment=["Targets", "Keys"])
def statistics_kernel(
    Logits,  # [M, width], row-major: the logits of ids first, first + 1, ...
    Targets,  # [M] int64: ids of the whole vocabulary
    Keys,  # [M, 2] int32, or None without noise
    Scattered,  # [width] int8: not 0 for special ids among the others, or None where there are none
    Out,  # [pieces, 5 or 7, M] FP32, written
    first, real, width, num_rows, num_specials,
    slack,  # SLACK of operator.py
    temperature,  # of the sample; read where TEMPERED
    BLOCK: tl.constexpr, NOISE: tl.constexpr, TEMPERED: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One piece of BLOCK ids of one row: its 5 or 7 numbers (see `merge`) into Out. Grid (M, pieces).

    TEMPERED: the sample is drawn from softmax(logits / temperature). OTHER: it is never the target.
    Perturbed logits are compared as exp(logit) / exp(-noise), roughly: the noise proper costs two logarithms and is
    computed for the winner alone. Where another id comes closer to it than `slack` and the rounding of the scores
    allow, or where the rough numbers underflow, it is computed for all.
    """
    # A row may begin behind 2^31 elements: int64 before the product. Rows are the grid's first dimension, the only one
    # that may exceed 65,535.
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    local = piece * BLOCK + tl.arange(0, BLOCK)
    inside = local < real
    # The only read of the logits: everything below stays in registers.
    logits = tl.load(Logits + row * width + local, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(inside, logits, NO_ID)
    # 1. Softmax relative to this piece's own largest logit; `merge` brings pieces to a common one. A piece of padding
    # alone has top = NO_ID, shifted = 0, and the mask keeps its sum at 0.
    top, index = tl.max(logits, 0, return_indices=True)  # of equal ones the first, as torch
    shifted = logits - top
    exponentials = tl.where(inside, tl.exp(shifted), 0.0)
    out = Out + piece.to(tl.int64) * (7 if NOISE else 5) * num_rows + row
    begin = first + piece * BLOCK
    tl.store(out, top)
    tl.store(out + num_rows, tl.sum(exponentials, 0))
    tl.store(out + num_rows * 2, tl.sum(exponentials * shifted, 0))  # for the entropy
    # 2. The target's logit: one more load, which the cache answers, costs less than a sum over the block.
    at = (tl.load(Targets + row) - first).to(tl.int32)
    is_here = (at >= piece * BLOCK) & (at < piece * BLOCK + BLOCK) & (at < real)
    target = tl.load(Logits + row * width + at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + num_rows * 3, tl.where(is_here, target, NO_ID))
    tl.store(out + num_rows * 4, (begin + index).to(tl.float32))  # exact: ids are below 2^24
    if NOISE:
        # 3. Gumbel-max: the argmax of logit + T gumbel(u) is an exact draw from softmax(logits / T). First the rough
        # race of all, of what those scores are divided by T.
        first_key, second_key = tl.load(Keys + row * 2), tl.load(Keys + row * 2 + 1)
        uniform = _uniform(first_key, second_key, first + local)
        allowed = inside & (first + local >= num_specials)
        if Scattered is not None:
            allowed = allowed & (tl.load(Scattered + local, mask=inside, other=1) == 0)
        if OTHER:
            allowed = allowed & (local != at)
        largest = tl.abs(top)
        if TEMPERED:
            exponentials = tl.exp(shifted / temperature)
            largest = largest / temperature
        rough = tl.where(allowed, _rough(exponentials, uniform), 0.0)
        best = tl.max(rough, 0)
        # Rivals: all that could have the largest exact score, the best itself among them. A ratio of 1 - d is a
        # distance of d between scores. slack is ten times the error of _rough; FP32 scores, logit + noise, round by
        # up to 2^-24 of themselves each, 1.2e-7 for two, and 4e-7 is three times that.
        is_rival = rough >= best * (1.0 - slack - 4e-7 * largest)
        # One sum says how many there are (in units of 2^16) and, where it is one, its index, which is below BLOCK and
        # so below 2^16. Less than 131,072 = 2 * 2^16: just one.
        found = tl.sum(tl.where(is_rival, tl.arange(0, BLOCK) + 65536, 0), 0)
        index = found & 65535
        # 1e-30 keeps nearly 8 decades from FP32's smallest normal number, 1.2e-38, below which exponentials are flushed
        # to 0. That far down, a special id, which is not allowed, has nearly all of the probability.
        if (found < 131072) & (best > 1e-30):
            # 4a. Nearly always: two slow logarithms for one id, in a scalar branch that the program takes as a whole.
            logit = tl.load(Logits + row * width + piece * BLOCK + index).to(tl.float32)
            noise = _gumbel(_uniform(first_key, second_key, begin + index))
            score = logit + (noise * temperature if TEMPERED else noise)
        else:
            # 4b. Doubt: the very scores of the reference for all ids, so that even ties are decided as there.
            noises = _gumbel(uniform)
            scores = tl.where(allowed, logits + (noises * temperature if TEMPERED else noises), NO_ID)
            score, index = tl.max(scores, 0, return_indices=True)
        tl.store(out + num_rows * 5, score)  # exact in both branches: pieces and shards are compared by it
        tl.store(out + num_rows * 6, (begin + index).to(tl.float32))


@jit(do_not_specialize=["first", "num_rows"], do_not_specialize_on_alignment=["Targets", "Lse", "GradLoss"])
def gradient_kernel(
    Logits,  # [M, width], read and overwritten with their gradient
    Targets,  # [M] int64
    Lse, GradLoss,  # [M] FP32: log-sum-exp over the whole vocabulary; gradient of each row's loss
    Sums,  # [ceil(M / ROWS), width] FP32, written: for the gradient of bias
    first, real, width, num_rows, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(softmax - one-hot) times the gradient of the row's loss, in place of Logits [M, width].

    Sums gets the sum over each ROWS rows. Padding ids get 0. Grid (width / BLOCK, M / ROWS), rounded up.
    """
    # A program keeps its ids and walks down ROWS rows, so that sums over rows need no exchange between threads.
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, stored = local < real, local < width
    tile = tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float32)
    for row in range(tile * ROWS, tl.minimum(tile * ROWS + ROWS, num_rows)):
        at = Logits + tl.cast(row, tl.int64) * width + local
        logits = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        is_target = first + local == tl.load(Targets + row)
        gradient = (tl.exp(logits - tl.load(Lse + row)) - tl.where(is_target, 1.0, 0.0)) * tl.load(GradLoss + row)
        # Padding ids are stored as 0 too: the products behind this read the whole chunk.
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(at, gradient.to(Logits.dtype.element_ty), mask=stored)
        sums += gradient  # before it is rounded for the products
    # One row of sums a program; torch adds them up in a fixed order, which atomics would not.
    tl.store(Sums + tile.to(tl.int64) * width + local, sums, mask=stored)
