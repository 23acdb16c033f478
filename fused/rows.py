"""How kernels that hold whole rows in registers are laid out on a GPU. Nothing here was measured on one."""

PREFETCH_BYTES = 2**16
"""Shared memory in which a program fetches rows ahead; A100 gives a program at most 163 KB, and some share it."""

MOST_STAGES = 4
"""The row at work and three on their way, which hide the latency of memory even of few resident programs."""


def row_block(columns: int) -> int:
    """Columns of a program: the next power of two, and no fewer than a warp fills with 128-bit loads."""
    return max(256, 1 << (columns - 1).bit_length())


def row_warps(columns: int, elements_per_thread: int) -> int:
    """Warps of a program, at most the 32 that hardware allows; wider rows give a thread more elements."""
    return max(1, min(32, row_block(columns) // (32 * elements_per_thread)))


def row_stages(columns: int, bytes_per_column: int) -> int:
    """Stages of a loop over rows of so many bytes: 1 fetches nothing ahead."""
    return 1 + min(MOST_STAGES - 1, PREFETCH_BYTES // (row_block(columns) * bytes_per_column))
