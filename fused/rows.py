"""How kernels that hold whole rows in registers are laid out on a GPU. Nothing here was measured on one.

A row in registers is read from memory once, however often its kernel goes over it: mean, variance and result of
LayerNorm, largest score, sum and quotient of softmax. The price is that a row is a power of two: at 768 or 1,536
columns a quarter of the lanes idles.
"""

PREFETCH_BYTES = 2**16
"""Shared memory in which a program fetches rows ahead; A100 gives a program at most 163 KB, and some share it."""

MOST_STAGES = 4
"""The row at work and three on their way, which hide the latency of memory even of few resident programs."""


def row_block(columns: int) -> int:
    """Columns of a program: the next power of two, and no fewer than a warp fills with 128-bit loads."""
    # 256 = 32 lanes with 8 elements of half precision, 128 bits each.
    return max(256, 1 << (columns - 1).bit_length())


def row_warps(columns: int, elements_per_thread: int) -> int:
    """Warps of a program, at most the 32 that hardware allows; wider rows give a thread more elements."""
    # One warp adds up its elements by shuffles alone; several meet in shared memory, behind a barrier at each sum.
    return max(1, min(32, row_block(columns) // (32 * elements_per_thread)))


def row_stages(columns: int, bytes_per_column: int) -> int:
    """Stages of a loop over rows of so many bytes: 1 fetches nothing ahead."""
    return 1 + min(MOST_STAGES - 1, PREFETCH_BYTES // (row_block(columns) * bytes_per_column))
