"""Attention probabilities: scale, relative bias, key padding, FP32 softmax and dropout in one pass.

Legend: n samples, N heads, L positions of a sample. The dropout mask is a function of (seed, row, key), row =
(sample N + head) L + query, and is drawn again in backward; saved are the half-precision probabilities alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused.ahead_of_time import ARCHITECTURES, HEADS, ROW_TOKENS, SAMPLE_TOKENS, CompileCase, meta
from fused.dispatch import Launch, architecture, use_kernel
from fused.philox import check_dropout, drop_threshold, keep_mask, keep_scale, seed_of
from fused.relative_bias import CompactBias, check_bias
from fused.rows import row_block, row_stages, row_warps
from fused.softmax_dropout_kernels import backward_kernel, diagonal_kernel, forward_kernel

MASKED_SCORE = -1e30
"""Score of a key that is not there: finite, so that a row without any key stays free of NaN."""

LONGEST = 16_384
"""Largest L of the kernels: a program holds a row in registers."""

ELEMENTS_PER_THREAD = {80: 16, 90: 16}
"""Of a row, by architecture; 8 are one 128-bit load of half precision: a row of 512 keys is one warp, which needs no
barrier. Chosen by registers of compiled kernels, not by measurement on a GPU."""

FORWARD_SAMPLES = 8
BACKWARD_SAMPLES = 16
"""Samples of one program: many share the work on its bias, few leave more programs to spread. In backward, each
group of samples writes its [N, L, L] sums. Not measured on a GPU."""

DIAGONAL_TILE = (64, 64)
"""Queries and distances that a program adds up at a time. Not measured on a GPU."""


def softmax_dropout(
    scores: Tensor,
    bias: CompactBias | Tensor,
    is_key: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale scores + bias)) over the keys, [n, N, L, L], in the dtype of the scores.

    scores [n, N, L, L] are raw q.k; is_key [n, L] bool is False for keys that do not exist, whose probability is 0 (a
    row without any key gives finite values that mean nothing). dropout is a rate, rounded to 2^-16; seed [1] int64,
    None draws one from the device's generator. Gradients reach scores and bias. A dense bias [N, L, L] is taken by
    the reference alone. Raises ValueError for shapes, types and devices that do not fit; reads no tensor on a GPU.
    """
    _check(scores, bias, is_key)
    check_dropout(dropout, seed, scores.device)
    seed = seed_of(dropout, seed, scores.device)
    if isinstance(bias, Tensor) or not use_kernel("softmax_dropout", scores):
        return softmax_dropout_ref(scores, bias, is_key, scale, dropout, seed)
    if scores.size(-1) > LONGEST:
        raise ValueError(f"scores is {list(scores.shape)}; the kernels take rows of at most {LONGEST}")
    p, dropped = softmax_dropout_forward(scores, *bias, is_key, scale, dropout, seed)
    return p if seed is None else dropped


def softmax_dropout_ref(
    scores: Tensor,
    bias: CompactBias | Tensor,
    is_key: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What softmax_dropout computes, in plain torch; float64 in float64. Dropout needs a seed."""
    inner = torch.promote_types(scores.dtype, torch.float32)
    dense = bias if isinstance(bias, Tensor) else bias.expand(scores.size(-1))
    x = scores.to(inner) * scale + dense.to(inner)
    p = x.masked_fill(~is_key[:, None, None, :], MASKED_SCORE).softmax(dim=-1)
    if dropout > 0.0:
        assert seed is not None
        threshold = drop_threshold(dropout)
        rows = torch.arange(scores.shape[:-1].numel(), device=scores.device)
        p = p * keep_mask(seed, threshold, scores.size(-1), rows).view(p.shape) * keep_scale(threshold)
    return p.to(scores.dtype)


def _check(scores: Tensor, bias: CompactBias | Tensor, is_key: Tensor) -> None:
    """Raise ValueError for the first argument that does not fit the scores."""
    shape = scores.shape
    if scores.dim() != 4 or shape[2] != shape[3] or not scores.is_floating_point():
        raise ValueError(f"scores is {list(shape)} {scores.dtype}; it must be [n, N, L, L] of a floating point type")
    if is_key.shape != (shape[0], shape[3]) or is_key.dtype != torch.bool or is_key.device != scores.device:
        raise ValueError(
            f"is_key is {list(is_key.shape)} {is_key.dtype} on {is_key.device}; "
            f"it must be {[shape[0], shape[3]]} torch.bool on {scores.device}"
        )
    if not isinstance(bias, Tensor):
        check_bias(bias, shape[1], scores.device)
    elif bias.shape != shape[1:]:
        raise ValueError(f"bias is {list(bias.shape)}; a dense bias must be {list(shape[1:])}")


def _forward_outputs(scores: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, and those after dropout (empty without)."""
    return scores.new_empty(scores.shape), scores.new_empty(0 if seed is None else scores.shape)


def _forward_launch(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], scale: float, dropout: float, arch: int
) -> Launch:
    """inputs: scores, distances, cls, is_key, seed; outputs: those of _forward_outputs."""
    (scores, distances, cls, is_key, seed), (p, dropped) = inputs, outputs
    assert distances is not None
    samples, heads, length, _ = p.shape
    threshold = drop_threshold(dropout)
    arguments = {
        "Scores": scores, "IsKey": is_key, "Distances": distances, "Cls": cls, "Seed": seed,
        "P": p, "Dropped": None if seed is None else dropped,
        "samples": samples, "heads": heads, "width": distances.size(1), "scale": scale,
        "threshold": threshold, "keep_scale": keep_scale(threshold),
        "EACH": FORWARD_SAMPLES, "L": length, "BLOCK": row_block(length),
        "STAGES": row_stages(length, p.element_size() + 1),
    }  # fmt: skip
    grid = (heads * length, -(-samples // FORWARD_SAMPLES))
    return Launch(forward_kernel, grid, arguments, row_warps(length, ELEMENTS_PER_THREAD[arch]))


@torch.library.custom_op("fused::softmax_dropout_forward", mutates_args=())
def softmax_dropout_forward(
    scores: Tensor, distances: Tensor, cls: Tensor, is_key: Tensor, scale: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Probabilities, and those after dropout (empty where seed is None)."""
    inputs = [None if one is None else one.contiguous() for one in (scores, distances, cls, is_key, seed)]
    outputs = _forward_outputs(scores, seed)
    _forward_launch(inputs, outputs, scale, dropout, architecture(scores.device)).start()
    return outputs


@softmax_dropout_forward.register_fake
def _(scores, distances, cls, is_key, scale, dropout, seed):
    return _forward_outputs(scores, seed)


def _backward_launches(
    inputs: Sequence[Tensor | None], grad_scores: Tensor, scale: float, dropout: float, arch: int
) -> tuple[Launch, Launch]:
    """inputs: grad_out, p, is_key, seed. The second launch reads what the first writes to its GradBias."""
    grad_out, p, is_key, seed = inputs
    samples, heads, length, _ = grad_scores.shape
    threshold, parts = drop_threshold(dropout), -(-samples // BACKWARD_SAMPLES)
    grad_bias = grad_scores.new_empty(parts, heads, length, length, dtype=torch.float32)
    arguments = {
        "GradOut": grad_out, "P": p, "IsKey": is_key, "Seed": seed, "GradScores": grad_scores, "GradBias": grad_bias,
        "samples": samples, "heads": heads, "scale": scale,
        "threshold": threshold, "keep_scale": keep_scale(threshold),
        "EACH": BACKWARD_SAMPLES, "L": length, "BLOCK": row_block(length),
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
    grad_out: Tensor, p: Tensor, distances: Tensor, cls: Tensor, is_key: Tensor, scale: float, dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of scores, distances and cls."""
    grad_scores = p.new_empty(p.shape)
    inputs = [grad_out.contiguous(), p, is_key.contiguous(), seed]
    launches = _backward_launches(inputs, grad_scores, scale, dropout, architecture(p.device))
    for launch in launches:
        launch.start()
    grad_bias, diagonals = (launches[1].arguments[name] for name in ("GradBias", "Diagonals"))
    of_cls = torch.stack((grad_bias[:, :, 0].sum((0, 2)), grad_bias[:, :, 1:, 0].sum((0, 2))), dim=1)
    of_distances = clip_distances(diagonals, distances.size(1) // 2)
    return grad_scores, of_distances.to(distances.dtype), of_cls.to(cls.dtype)


def clip_distances(sums: Tensor, reach: int) -> Tensor:
    """Sums [N, 2 L - 1] over distances -(L - 1) .. L - 1 to sums over clipped ones, [N, 2 reach + 1]; no atomics."""
    middle = sums.size(1) // 2
    if reach >= middle:
        return torch.nn.functional.pad(sums, (reach - middle, reach - middle))
    inner = sums[:, middle - reach : middle + reach + 1].clone()
    inner[:, 0] += sums[:, : middle - reach].sum(1)
    inner[:, -1] += sums[:, middle + reach + 1 :].sum(1)
    return inner


@softmax_dropout_backward.register_fake
def _(grad_out, p, distances, cls, is_key, scale, dropout, seed):
    return tuple(x.new_empty(x.shape) for x in (p, distances, cls))


def _setup(ctx, inputs, output):
    _, distances, cls, is_key, ctx.scale, ctx.dropout, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], distances, cls, is_key, seed)


def _backward(ctx, grad_p, grad_dropped):
    *saved, seed = ctx.saved_tensors
    grad_out = grad_p if seed is None else grad_dropped
    return *softmax_dropout_backward(grad_out, *saved, ctx.scale, ctx.dropout, seed), None, None, None, None


softmax_dropout_forward.register_autograd(_backward, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """16K tokens in bfloat16 as padded samples of 512, with dropout."""
    return [case for arch in ARCHITECTURES for heads in HEADS for case in _cases(heads, arch)]


def _cases(heads: int, arch: int) -> list[CompileCase]:
    samples, length = ROW_TOKENS // SAMPLE_TOKENS, SAMPLE_TOKENS
    scores = meta(samples, heads, length, length, dtype=torch.bfloat16)
    distances, cls = (meta(heads, width, dtype=torch.float32) for width in (2 * length - 3, 2))
    is_key, seed = meta(samples, length, dtype=torch.bool), meta(1, dtype=torch.int64)
    outputs = _forward_outputs(scores, seed)
    forward = _forward_launch([scores, distances, cls, is_key, seed], outputs, 0.125, 0.1, arch)
    backward, diagonals = _backward_launches([scores, scores, is_key, seed], scores, 0.125, 0.1, arch)
    name = f"{heads} heads, {samples} x {length}"
    return [
        CompileCase(f"softmax_dropout forward, {name}", forward, arch, max_registers=64),
        CompileCase(f"softmax_dropout backward, {name}", backward, arch, max_registers=96),
        CompileCase(f"softmax_dropout diagonal sums, {name}", diagonals, arch, max_registers=160, wide_loads=False),
    ]
