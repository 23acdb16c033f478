"""Attention probabilities: scale, relative bias, key padding, FP32 softmax and dropout in one pass.

Legend: n samples, N heads of this rank, L positions of a sample. The dropout mask is attention's and is drawn
again in backward; saved are the half-precision probabilities alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused.ahead_of_time import ARCHITECTURES, HEADS, ROW_TOKENS, SAMPLE_TOKENS, CompileCase, meta
from fused.dispatch import Launch, architecture, use_kernel
from fused.dropout import Dropout, checked_dropout, drop_threshold, keep, keep_scale
from fused.relative_bias import CompactBias, check_bias, clip_distances
from fused.rows import row_block, row_stages, row_warps
from fused.softmax_dropout.kernels import backward_kernel, diagonal_kernel, forward_kernel

MASKED_SCORE = -1e30
"""Score of a key that is not there: finite, so that a row without any key stays free of NaN."""

WIDEST = 16_384
"""Largest L of the kernels: a program holds a row in registers."""

ELEMENTS_PER_THREAD = {80: 16, 90: 16}
"""Of a row, by architecture; 8 are one 128-bit load of half precision: a row of 512 keys is one warp, which needs no
barrier. Chosen by registers (63 to 80) of compiled kernels, not by measurement on a GPU."""

FORWARD_SAMPLES = 8
BACKWARD_SAMPLES = 16
"""Samples of one program: many share the work on its bias, few leave more programs to spread. In backward, each
group of samples writes its [N, L, L] sums in FP32, 12.6 MB for 12 heads and 512 positions; with 16 that is an eighth of
what the gradient of the scores takes in half precision. Not measured on a GPU."""

DIAGONAL_TILE = (64, 64)
"""Queries and distances that a program adds up at a time: 64 distances are 256 bytes of a row; 32 numbers a thread of
4 warps. Not measured on a GPU."""


def softmax_dropout(
    scores: Tensor,
    bias: CompactBias,
    is_key: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    term: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale scores + bias + term)) over the keys, [n, N, L, L], in the dtype of the scores.

    scores [n, N, L, L] are raw q.k; is_key [n, L] bool is False for keys that do not exist, whose probability is 0 (a
    row without any key gives finite values that mean nothing). Gradients reach scores, bias and term. A dense term
    [N, L, L], and a bias that has no part for [CLS], have no kernel: on a GPU, too, the reference computes them,
    silently and with [n, N, L, L] in FP32. Raises ValueError for shapes, types and devices that do not fit; reads no
    tensor on a GPU.
    """
    _check(scores, bias, is_key, term)
    dropout = checked_dropout(dropout, scores.size(0), scores.size(-1), scores.device)
    # A term and a bias without [CLS] are for `attention`, which has kernels for both.
    if term is not None or bias.cls is None or not use_kernel("softmax_dropout", scores):
        return softmax_dropout_ref(scores, bias, is_key, scale, dropout, term)
    if scores.size(-1) > WIDEST:
        raise ValueError(f"scores is {list(scores.shape)}; the kernels take rows of at most {WIDEST}")
    rate, seed, keys, first_head = dropout or (0.0, None, None, 0)
    p, dropped = softmax_dropout_forward(scores, bias.distances, bias.cls, is_key, scale, rate, seed, keys, first_head)
    return p if dropout is None else dropped  # both are outputs, since backward needs p


def softmax_dropout_ref(
    scores: Tensor,
    bias: CompactBias,
    is_key: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    term: Tensor | None = None,
) -> Tensor:
    """What softmax_dropout computes, in plain torch; float64 in float64."""
    inner = torch.promote_types(scores.dtype, torch.float32)
    dense = bias.expand(scores.size(-1)).to(inner)
    if term is not None:
        dense = dense + term.to(inner)
    x = scores.to(inner) * scale + dense  # bias is not scaled
    p = x.masked_fill(~is_key[:, None, None, :], MASKED_SCORE).softmax(dim=-1)
    if dropout is not None:
        p = p * keep(dropout, *scores.shape[1:3]) * dropout.keep_scale
    return p.to(scores.dtype)


def _check(scores: Tensor, bias: CompactBias, is_key: Tensor, term: Tensor | None) -> None:
    """Raise ValueError for the first argument that does not fit the scores."""
    shape = scores.shape
    if scores.dim() != 4 or shape[2] != shape[3] or not scores.is_floating_point():
        raise ValueError(f"scores is {list(shape)} {scores.dtype}; it must be [n, N, L, L] of a floating point type")
    if is_key.shape != (shape[0], shape[3]) or is_key.dtype != torch.bool or is_key.device != scores.device:
        raise ValueError(
            f"is_key is {list(is_key.shape)} {is_key.dtype} on {is_key.device}; "
            f"it must be {[shape[0], shape[3]]} torch.bool on {scores.device}"
        )
    check_bias(bias, shape[1], scores.device)
    if term is not None and (term.shape != shape[1:] or not term.is_floating_point() or term.device != scores.device):
        raise ValueError(
            f"term is {list(term.shape)} {term.dtype} on {term.device}; "
            f"it must be {list(shape[1:])} of a floating point type on {scores.device}"
        )


def _forward_outputs(scores: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, and those after dropout (empty without)."""
    return scores.new_empty(scores.shape), scores.new_empty(0 if seed is None else scores.shape)


def _forward_launch(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], scale: float, rate: float, first_head: int, arch: int
) -> Launch:
    """inputs: scores, distances, cls, is_key, seed, keys; outputs: those of _forward_outputs."""
    (scores, distances, cls, is_key, seed, keys), (p, dropped) = inputs, outputs
    assert distances is not None
    samples, heads, length, _ = p.shape
    threshold = drop_threshold(rate)
    arguments = {
        "Scores": scores, "IsKey": is_key, "Distances": distances, "Cls": cls, "Seed": seed, "Keys": keys,
        "P": p, "Dropped": None if seed is None else dropped,
        "samples": samples, "heads": heads, "first_head": first_head, "width": distances.size(1), "L": length,
        "scale": scale, "threshold": threshold, "keep_scale": keep_scale(threshold),
        "EACH": FORWARD_SAMPLES, "BLOCK": row_block(length),
        "STAGES": row_stages(length, p.element_size() + 1),
    }  # fmt: skip
    grid = (heads * length, -(-samples // FORWARD_SAMPLES))
    return Launch(forward_kernel, grid, arguments, row_warps(length, ELEMENTS_PER_THREAD[arch]))


@torch.library.custom_op("fused::softmax_dropout_forward", mutates_args=())
def softmax_dropout_forward(
    scores: Tensor, distances: Tensor, cls: Tensor, is_key: Tensor, scale: float, rate: float, seed: Tensor | None,
    keys: Tensor | None, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Probabilities, and those after dropout (empty where seed is None)."""
    # Kernels take rows without gaps; the scores of a batched product have none, so nothing is copied.
    inputs = [None if one is None else one.contiguous() for one in (scores, distances, cls, is_key, seed, keys)]
    outputs = _forward_outputs(scores, seed)
    _forward_launch(inputs, outputs, scale, rate, first_head, architecture(scores.device)).start()
    return outputs


@softmax_dropout_forward.register_fake
def _(scores, distances, cls, is_key, scale, rate, seed, keys, first_head):
    return _forward_outputs(scores, seed)


def _backward_launches(
    inputs: Sequence[Tensor | None], grad_scores: Tensor, scale: float, rate: float, first_head: int, arch: int
) -> tuple[Launch, Launch]:
    """inputs: grad_out, p, is_key, seed, keys. The second launch reads what the first writes to its GradBias."""
    grad_out, p, is_key, seed, keys = inputs
    samples, heads, length, _ = grad_scores.shape
    threshold, parts = drop_threshold(rate), -(-samples // BACKWARD_SAMPLES)
    grad_bias = grad_scores.new_empty(parts, heads, length, length, dtype=torch.float32)
    arguments = {
        "GradOut": grad_out, "P": p, "IsKey": is_key, "Seed": seed, "Keys": keys,
        "GradScores": grad_scores, "GradBias": grad_bias,
        "samples": samples, "heads": heads, "first_head": first_head, "L": length, "scale": scale,
        "threshold": threshold, "keep_scale": keep_scale(threshold),
        "EACH": BACKWARD_SAMPLES, "BLOCK": row_block(length),
        "STAGES": row_stages(length, 2 * grad_scores.element_size() + 1),
    }  # fmt: skip
    rows, columns = DIAGONAL_TILE
    diagonals = {
        "GradBias": grad_bias, "Diagonals": grad_bias.new_empty(heads, 2 * length - 1), "parts": parts,
        "heads": heads, "L": length, "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    warps = row_warps(length, ELEMENTS_PER_THREAD[arch])
    return (
        Launch(backward_kernel, (heads * length, parts), arguments, warps),
        Launch(diagonal_kernel, (-(-(2 * length - 1) // columns), heads), diagonals),
    )


@torch.library.custom_op("fused::softmax_dropout_backward", mutates_args=())
def softmax_dropout_backward(
    grad_out: Tensor, p: Tensor, distances: Tensor, cls: Tensor, is_key: Tensor, scale: float, rate: float,
    seed: Tensor | None, keys: Tensor | None, first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of scores, distances and cls."""
    grad_scores = p.new_empty(p.shape)
    keys = None if keys is None else keys.contiguous()
    inputs = [grad_out.contiguous(), p, is_key.contiguous(), seed, keys]
    launches = _backward_launches(inputs, grad_scores, scale, rate, first_head, architecture(p.device))
    for launch in launches:
        launch.start()
    grad_bias, diagonals = (launches[1].arguments[name] for name in ("GradBias", "Diagonals"))
    # What diagonal_kernel leaves out: row 0 whole, corner included, and column 0 below it.
    of_cls = torch.stack((grad_bias[:, :, 0].sum((0, 2)), grad_bias[:, :, 1:, 0].sum((0, 2))), dim=1)
    of_distances = clip_distances(diagonals, distances.size(1) // 2)
    return grad_scores, of_distances.to(distances.dtype), of_cls.to(cls.dtype)


@softmax_dropout_backward.register_fake
def _(grad_out, p, distances, cls, is_key, scale, rate, seed, keys, first_head):
    return tuple(x.new_empty(x.shape) for x in (p, distances, cls))


def _setup(ctx, inputs, output):
    # Probabilities before dropout [n, N, L, L] and small things. distances and cls for their types and shapes; not the
    # scores, which the gradient does not need, nor the dropped probabilities, which the product behind this one keeps.
    _, *tensors, ctx.scale, ctx.rate, seed, keys, ctx.first_head = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *tensors, seed, keys)


def _backward(ctx, grad_p, grad_dropped):
    *saved, seed, keys = ctx.saved_tensors
    # Only the output that softmax_dropout returned has a gradient.
    grad_out = grad_p if seed is None else grad_dropped
    grads = softmax_dropout_backward(grad_out, *saved, ctx.scale, ctx.rate, seed, keys, ctx.first_head)
    return *grads, *[None] * 6


softmax_dropout_forward.register_autograd(_backward, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """16K tokens in bfloat16 as padded samples of 512, with dropout."""
    return [case for arch in ARCHITECTURES for heads in HEADS for case in _cases(heads, arch)]


def _cases(heads: int, arch: int) -> list[CompileCase]:
    samples, length = ROW_TOKENS // SAMPLE_TOKENS, SAMPLE_TOKENS
    scores = meta(samples, heads, length, length, dtype=torch.bfloat16)
    distances, cls = (meta(heads, width, dtype=torch.float32) for width in (2 * length - 3, 2))
    is_key, (seed, keys) = meta(samples, length, dtype=torch.bool), (meta(x, dtype=torch.int64) for x in (1, samples))
    outputs = _forward_outputs(scores, seed)
    forward = _forward_launch([scores, distances, cls, is_key, seed, keys], outputs, 0.125, 0.1, 0, arch)
    backward, diagonals = _backward_launches([scores, scores, is_key, seed, keys], scores, 0.125, 0.1, 0, arch)
    name = f"{heads} heads, {samples} x {length}"
    return [
        CompileCase(f"softmax_dropout forward, {name}", forward, arch, max_registers=80),
        CompileCase(f"softmax_dropout backward, {name}", backward, arch, max_registers=96),
        CompileCase(f"softmax_dropout diagonal sums, {name}", diagonals, arch, max_registers=160, wide_loads=False),
    ]
