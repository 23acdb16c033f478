"""Triton kernels on one chunk of logits: what a row's statistics need, and the gradient in place of the logits.

Legend: M rows, C ids of the chunk, of which the first `real` are not padding. Matrix products are torch's: a product
kernel with the noise in its epilogue needs all registers of a thread for its accumulator and spills. FP32 inside; no
atomics, so results repeat bit for bit.
"""

from fused.dispatch import INTERPRETED, jit, tl

NO_ID = tl.constexpr(-1e30)


@jit
def _mix(x):
    """The avalanche of the reference's `_mix`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _uniform(first_key, second_key, ids):
    """(h + 1/2) 2^-32 of the reference's `hash32` for one row."""
    mixed = _mix((ids.to(tl.uint32) * 0x9E3779B9) ^ first_key.to(tl.uint32, bitcast=True))
    mixed = _mix(mixed ^ second_key.to(tl.uint32, bitcast=True))
    return (mixed.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32


@jit
def _gumbel(uniform):
    """The reference's `gumbel_noise`. The interpreter has no log1p and takes FP64 for it."""
    if INTERPRETED:
        return -tl.log(-tl.log(1.0 - uniform.to(tl.float64))).to(tl.float32)
    return -tl.extra.cuda.libdevice.log(-tl.extra.cuda.libdevice.log1p(-uniform))


@jit
def _rough(exponentials, uniform):
    """exponentials exp(gumbel) to a relative 2e-5, with the hardware's logarithm and division."""
    complement = 1.0 - uniform
    log2 = tl.log2(complement) if INTERPRETED else tl.extra.cuda.libdevice.fast_log2f(complement)
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333))
    inverse = tl.where(uniform < 0.015625, series, log2 * -0.6931472)  # -log(1 - u)
    if INTERPRETED:
        return exponentials / inverse
    return tl.extra.cuda.libdevice.fast_dividef(exponentials, inverse)


@jit
def statistics_kernel(
    Logits, Targets, Keys, Out, first, real, width, num_rows, num_specials, slack,
    BLOCK: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """One piece of BLOCK ids of one row: its 5 or 7 numbers (see `merge`) into Out [pieces, 5 or 7, M].

    Logits [M, width] of the ids from `first` on. Grid (M, pieces).

    Perturbed logits are compared as exp(logit) / exp(-noise), roughly: the noise proper costs two logarithms and is
    computed for the winner alone. Where another id comes closer to it than `slack` and the rounding of the scores
    allow, or where the rough numbers underflow, it is computed for all.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    local = piece * BLOCK + tl.arange(0, BLOCK)
    inside = local < real
    logits = tl.load(Logits + row * width + local, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(inside, logits, NO_ID)
    top, place = tl.max(logits, 0, return_indices=True)
    shifted = logits - top
    exponentials = tl.where(inside, tl.exp(shifted), 0.0)
    out = Out + piece.to(tl.int64) * (7 if NOISE else 5) * num_rows + row
    begin = first + piece * BLOCK
    tl.store(out, top)
    tl.store(out + num_rows, tl.sum(exponentials, 0))
    tl.store(out + num_rows * 2, tl.sum(exponentials * shifted, 0))
    at = (tl.load(Targets + row) - first).to(tl.int32)
    is_here = (at >= piece * BLOCK) & (at < piece * BLOCK + BLOCK) & (at < real)
    target = tl.load(Logits + row * width + at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + num_rows * 3, tl.where(is_here, target, NO_ID))
    tl.store(out + num_rows * 4, (begin + place).to(tl.float32))
    if NOISE:
        first_key, second_key = tl.load(Keys + row * 2), tl.load(Keys + row * 2 + 1)
        uniform = _uniform(first_key, second_key, first + local)
        allowed = inside & (first + local >= num_specials)
        rough = tl.where(allowed, _rough(exponentials, uniform), 0.0)
        best = tl.max(rough, 0)
        is_rival = rough >= best * (1.0 - slack - 4e-7 * tl.abs(top))
        found = tl.sum(tl.where(is_rival, tl.arange(0, BLOCK) + 65536, 0), 0)  # how many, and where if it is one
        place = found & 65535
        if (found < 131072) & (best > 1e-30):
            logit = tl.load(Logits + row * width + piece * BLOCK + place).to(tl.float32)
            score = logit + _gumbel(_uniform(first_key, second_key, begin + place))
        else:
            scores = tl.where(allowed, logits + _gumbel(uniform), NO_ID)
            score, place = tl.max(scores, 0, return_indices=True)
        tl.store(out + num_rows * 5, score)
        tl.store(out + num_rows * 6, (begin + place).to(tl.float32))


@jit
def gradient_kernel(
    Logits, Targets, Lse, GradLoss, Sums, first, real, width, num_rows, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """(softmax - one-hot) times the gradient of the row's loss, in place of Logits [M, width].

    Sums [ceil(M / ROWS), width] FP32 gets the sum over each ROWS rows. Padding ids get 0. Grid (width, M) in tiles.
    """
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, stored = local < real, local < width
    tile = tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float32)
    for row in range(tile * ROWS, tl.minimum(tile * ROWS + ROWS, num_rows)):
        at = Logits + tl.cast(row, tl.int64) * width + local
        logits = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        is_target = first + local == tl.load(Targets + row)
        gradient = (tl.exp(logits - tl.load(Lse + row)) - tl.where(is_target, 1.0, 0.0)) * tl.load(GradLoss + row)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(at, gradient.to(Logits.dtype.element_ty), mask=stored)
        sums += gradient
    tl.store(Sums + tile.to(tl.int64) * width + local, sums, mask=stored)
