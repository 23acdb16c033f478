"""Launches of the attention kernels, and their layout on a GPU.

Legend: T tokens, N heads of this rank, K head dimension, n samples, L longest sample, S side of the term.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ahead_of_time import ARCHITECTURES, HEADS, ROW_TOKENS, SAMPLE_TOKENS, CompileCase, meta
from fused.attention.kernels import bias_kernel, forward_kernel, key_kernel, query_kernel, term_kernel
from fused.dispatch import Launch
from fused.dropout import drop_threshold, keep_scale

HEAD_DIMS = (32, 64, 128)
"""Powers of two, as Triton's tiles must be; others are refused rather than padded."""


class Tile(NamedTuple):
    """Queries and keys of a tile of scores, warps of a program, stages of its loop."""

    rows: int
    cols: int
    warps: int
    stages: int


Tiles = Mapping[tuple[int, int], Tile]
"""By architecture and head dimension."""

# The rule for all four stands below TERM. 2 stages: one tile of the loop at work, the next on its way.
FORWARD: Tiles = {  # rows own, cols pass by: 128 queries share each read of a key
    (80, 32): Tile(128, 64, 8, 2), (80, 64): Tile(128, 64, 8, 2), (80, 128): Tile(128, 32, 8, 2),
    (90, 32): Tile(128, 64, 8, 2), (90, 64): Tile(128, 64, 8, 2), (90, 128): Tile(128, 64, 8, 2),
}  # fmt: skip
QUERY: Tiles = {  # rows own; narrow in keys, as squares of COLS x COLS are turned in registers beside the products
    (80, 32): Tile(64, 32, 4, 2), (80, 64): Tile(64, 32, 4, 2), (80, 128): Tile(64, 16, 4, 2),
    (90, 32): Tile(64, 32, 4, 2), (90, 64): Tile(64, 32, 4, 2), (90, 128): Tile(128, 32, 8, 2),
}  # fmt: skip
KEY: Tiles = {  # cols own, with two accumulators [COLS, K]: at K 128 queries shrink to 32
    (80, 32): Tile(64, 64, 4, 2), (80, 64): Tile(64, 32, 4, 2), (80, 128): Tile(32, 64, 8, 2),
    (90, 32): Tile(64, 64, 4, 2), (90, 64): Tile(64, 64, 4, 2), (90, 128): Tile(32, 64, 8, 2),
}  # fmt: skip
# Nothing is fetched ahead in TERM: its loads stand in a branch.
TERM: Tiles = {(arch, head_dim): Tile(64, 32, 4, 1) for arch in ARCHITECTURES for head_dim in HEAD_DIMS}
"""The largest that neither spill registers nor use stack when compiled, with 16 rows of a tile for each warp where that
can be: the compiler gives warps rows first, and those without would repeat the others' work. QUERY's rows are a
multiple of its cols: sums over diagonals turn squares."""

BIAS = (64, 32)
"""Lines and entries that a program of bias_kernel adds at a time: 16 numbers a thread of 4 warps, 384 programs at base.
Not measured on a GPU."""

FLOAT32 = Tile(32, 32, 4, 1)
"""Of every kernel in FP32, which is not for speed: without tensor cores, and small for the sake of shared memory."""


def tile_of(tiles: Tiles, x: Tensor, architecture: int) -> Tile:
    """The tile for x [T, N, K]."""
    # By size, as float16 and bfloat16 compile alike; float64 never comes here.
    return FLOAT32 if x.element_size() == 4 else tiles[architecture, x.size(2)]


class Inputs(NamedTuple):
    """What every kernel reads: tensors and numbers of attention.

    q, k, v may be strided, the others are contiguous; seed and keys are None without dropout, distances without a
    relative bias, cls where position 0 is not apart.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    distances: Tensor | None
    cls: Tensor | None
    term: Tensor | None
    begin: Tensor
    length: Tensor
    seed: Tensor | None
    keys: Tensor | None
    longest: int
    stride: int
    rate: float
    first_head: int

    def tiles(self, side: int) -> tuple[int, int, int]:
        """A grid over tiles of positions, heads and samples."""
        return -(-self.longest // side), self.q.size(1), self.begin.numel()

    def tensors(self) -> dict[str, Tensor | None]:
        """Leading arguments of every kernel, before its outputs; backward puts GradOut and Lse after V."""
        return {
            "Q": self.q, "K_": self.k, "V": self.v, "Distances": self.distances, "Cls": self.cls, "Term": self.term,
            "Begin": self.begin, "Length": self.length, "Seed": self.seed, "Keys": self.keys,
        }  # fmt: skip

    def numbers(self) -> dict[str, int | float]:
        """Arguments of every kernel after its outputs."""
        q, k, v = self.q, self.k, self.v
        threshold = drop_threshold(self.rate)
        return {
            "q_t": q.stride(0), "q_n": q.stride(1), "k_t": k.stride(0), "k_n": k.stride(1),
            "v_t": v.stride(0), "v_n": v.stride(1), "stride": self.stride, "heads": q.size(1),
            "first_head": self.first_head, "width": 0 if self.distances is None else self.distances.size(1),
            "term_len": 0 if self.term is None else self.term.size(1), "scale": q.size(2) ** -0.5,
            "threshold": threshold, "keep_scale": keep_scale(threshold), "K": q.size(2),
        }  # fmt: skip


def forward_launch(inputs: Inputs, out: Tensor, lse: Tensor, arch: int) -> Launch:
    """Writes out [T, N, K] and lse [T, N], where a token belongs to a sample."""
    rows, cols, warps, stages = tile_of(FORWARD, inputs.q, arch)
    arguments = {**inputs.tensors(), "Out": out, "Lse": lse, **inputs.numbers(), "ROWS": rows, "COLS": cols}
    return Launch(forward_kernel, inputs.tiles(rows), arguments, warps, stages)


def backward_launches(
    inputs: Inputs, arriving: Sequence[Tensor], grads: Sequence[Tensor | None], arch: int
) -> dict[str, Launch]:
    """By name, in the order in which they must run; arriving: out, lse and the gradient of out.

    grads: that of q, k, v as one [T, N, 3, K], written where a token belongs to a sample, and those of distances, cls
    and term, written everywhere, None where there is none.
    """
    (out, lse, grad_out), (grad_qkv, grad_distances, grad_cls, grad_term) = arriving, grads
    assert grad_qkv is not None
    grad_q, grad_k, grad_v = grad_qkv.unbind(2)
    rows, cols, warps, stages = tile_of(QUERY, grad_q, arch)
    tiles, heads, samples = grid = inputs.tiles(rows)
    parts = tiles * (rows // cols)
    # Each program of query_kernel has rows of its own in both. Squares start slots that the next square completes:
    # hence one more than there are parts.
    delta = lse.new_empty(lse.shape)
    slots = (parts + 1) * cols
    diagonals = None if grad_distances is None else lse.new_empty(samples, parts, heads, slots)
    cls_sums = None if grad_cls is None else lse.new_empty(samples, tiles, heads, 2)
    tensors = inputs.tensors()
    tensors |= {"GradOut": grad_out, "Lse": lse}
    numbers = inputs.numbers()
    launches = {"query": Launch(query_kernel, grid, _ordered(query_kernel, {
        **tensors, "Out": out, "Delta": delta, "GradQ": grad_q, "Diagonals": diagonals,
        "ClsSums": cls_sums, **numbers, "slots": slots, "ROWS": rows, "COLS": cols,
    }), warps, stages)}  # fmt: skip
    if grad_distances is not None:
        width, (lines, entries) = grad_distances.size(1), BIAS
        launches["bias"] = Launch(bias_kernel, (-(-width // entries), heads), {
            "Diagonals": diagonals, "ClsSums": cls_sums, "Length": inputs.length,
            "GradDistances": grad_distances, "GradCls": grad_cls, "heads": heads, "width": width, "tiles": tiles,
            "slots": slots, "samples": samples, "ROWS": rows, "COLS": cols, "LINES": lines, "ENTRIES": entries,
        })  # fmt: skip
    rows, cols, warps, stages = tile_of(KEY, grad_q, arch)
    launches["key"] = Launch(key_kernel, inputs.tiles(cols), _ordered(key_kernel, {
        **tensors, "Delta": delta, "GradK": grad_k, "GradV": grad_v, **numbers, "ROWS": rows, "COLS": cols,
    }), warps, stages)  # fmt: skip
    if grad_term is not None:
        rows, cols, warps, stages = tile_of(TERM, grad_q, arch)
        size = grad_term.size(1)
        launches["term"] = Launch(term_kernel, (-(-size // rows), -(-size // cols), heads), _ordered(term_kernel, {
            **tensors, "Delta": delta, "GradTerm": grad_term, **numbers, "samples": samples, "ROWS": rows, "COLS": cols,
        }), warps, stages)  # fmt: skip
    return launches


def _ordered(kernel: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the kernel's order, which ahead-of-time compilation checks."""
    return {name: arguments[name] for name in kernel.arg_names}


STACK = {("key backward, term, dropout", 90, 64): 8, ("forward, term, dropout", 90, 128): 40}
"""Bytes that a few spilled registers take, of the rarer variants, which share their tiles with the others."""


def compile_cases() -> list[CompileCase]:
    """16K tokens in bfloat16 as packed samples of 512: main's, the auxiliary's, and those of other position schemes."""
    return [case for arch in ARCHITECTURES for head_dim in HEAD_DIMS for case in _cases(head_dim, arch)]


def _cases(head_dim: int, arch: int) -> list[CompileCase]:
    heads, samples = HEADS[0], ROW_TOKENS // SAMPLE_TOKENS
    q, k, v = meta(ROW_TOKENS, heads, 3, head_dim, dtype=torch.bfloat16).unbind(2)  # as one projection gives them
    out, lse = meta(ROW_TOKENS, heads, head_dim, dtype=torch.bfloat16), meta(ROW_TOKENS, heads, dtype=torch.float32)
    distances, cls = (meta(heads, width, dtype=torch.float32) for width in (2 * SAMPLE_TOKENS - 3, 2))
    term = meta(heads, SAMPLE_TOKENS, SAMPLE_TOKENS, dtype=torch.bfloat16)
    begin, seed, keys = (meta(size, dtype=torch.int64) for size in (samples, 1, samples))
    length = meta(samples, dtype=torch.int32)
    dropping = Inputs(q, k, v, distances, cls, None, begin, length, seed, keys, SAMPLE_TOKENS, 1, 0.1, 0)
    variants = {
        "dropout": dropping,
        "no dropout": dropping._replace(seed=None, keys=None, rate=0.0),
        "term, dropout": dropping._replace(term=term),
        "[CLS] not reset, dropout": dropping._replace(cls=None),
        "no bias, dropout": dropping._replace(distances=None, cls=None),
    }
    grad_qkv = meta(ROW_TOKENS, heads, 3, head_dim, dtype=torch.bfloat16)
    cases = []
    for variant, inputs in variants.items():
        grads = [grad_qkv, inputs.distances, inputs.cls, inputs.term]
        backward = backward_launches(inputs, [out, lse, out], grads, arch)
        launches = {"forward": forward_launch(inputs, out, lse, arch)}
        launches |= {f"{kernel} backward": launch for kernel, launch in backward.items()}
        for kernel, launch in launches.items():
            part = f"{kernel}, {variant}"
            name = f"attention {part}, {samples} x {SAMPLE_TOKENS}, K {head_dim}"
            stack, multiplies = STACK.get((part, arch, head_dim), 0), launch.kernel is not bias_kernel
            # Sums of diagonals begin anywhere, so that bias_kernel has no wide loads.
            cases.append(
                CompileCase(name, launch, arch, max_stack=stack, wide_loads=multiplies, tensor_cores=multiplies)
            )
    return cases
