"""The vocabulary head in one pass: loss, exact sample, most probable id and entropy, without storing the logits.

Legend: M rows, H hidden, V vocabulary rows of a shard, t shards, C ids of a chunk.

One shard: `linear_cross_entropy`. Several: every rank calls `shard_statistics`, gathers its result over the ranks (the
only exchange, 5 or 7 numbers a row), calls `combine`, and makes the loss differentiable with `shard_loss`; rows then
get the part of their gradient that comes from this shard, and the caller sums it over ranks. Logits exist one chunk
[M, C] at a time, in the dtype of rows; the gradient computes them again.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused.ahead_of_time import ARCHITECTURES, ROW_TOKENS, CompileCase, meta
from fused.dispatch import Launch, use_cpu, use_kernel
from fused.linear_cross_entropy.cpu import MOST_KEPT, linear_cross_entropy_cpu
from fused.linear_cross_entropy.kernels import gradient_kernel, statistics_kernel
from fused.linear_cross_entropy.reference import (
    MOST_IDS,
    Sampling,
    Statistics,
    VocabularyShard,
    combine,
    merge,
    shard_loss_ref,
    shard_statistics_ref,
)

CHUNK = 8000
"""Ids of a chunk. Shards of 128,000 ids over 1, 2, 4 or 8 ranks are whole chunks, so that the products have the same
shape and the same last bit in all of them. 2,457 rows of a chunk take 39 MB in bf16: below the second-level cache of
A100 (40 MB) and H100 (50), so that a kernel finds part of the logits there. Not measured on a GPU."""
PIECE = 4096
"""Ids per program of the statistics, with 8 warps: 16 a thread, two 128-bit loads in half precision, and two programs
cover a chunk. 110 registers with the noise [docs/kernels_compiled.md]. Not measured on a GPU."""
GRADIENT_TILE = (1024, 32)
"""Ids and rows per program of the gradient, with 4 warps: 8 ids a thread, one 128-bit load of a row; more rows make
fewer sums to add up and leave fewer programs, 8 x 77 for 2,457 rows. Not measured on a GPU."""
SLACK = 2e-4
"""Rough scores this close, of 1, are computed again in full. By the errors that NVIDIA documents for ex2, lg2 and
division they are wrong by 2e-5; rounding of large logits is added in the kernel."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    sampling: Sampling | None = None,
) -> Statistics:  # fmt: skip
    """Statistics of softmax(rows weight^T + bias) for a vocabulary in one piece; gradients flow through the loss.

    rows [M, H], weight [V, H] and bias [V] share a dtype; targets [M] int64 are ids below shard.vocab_size; with
    sampling, ids are drawn. Temperature and forbidden targets concern the draws alone. Raises ValueError for shapes,
    types, devices and, on the CPU, ids that do not fit, and for a temperature that is not positive.
    """
    is_small = rows.size(0) * weight.size(0) <= MOST_KEPT
    name = "linear_cross_entropy"
    if is_small and use_cpu(name, rows) and not use_kernel(name, rows, weight):
        _check(rows, weight, bias, targets, shard, sampling)
        return linear_cross_entropy_cpu(rows, weight, bias, targets, shard, sampling)
    partial = shard_statistics(rows, weight, bias, targets, shard, sampling)
    statistics = combine(partial[None])
    # Not _replace, which the Dynamo of torch 2.11 cannot return from a graph.
    return Statistics(shard_loss(rows, weight, bias, targets, shard, statistics), *statistics[1:])


@torch.no_grad()
def shard_statistics(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    sampling: Sampling | None = None,
) -> Tensor:  # fmt: skip
    """What one shard says about the rows, [5, M] or with noise [7, M], for `combine`. Arguments as above."""
    _check(rows, weight, bias, targets, shard, sampling)
    if not use_kernel("linear_cross_entropy", rows, weight):
        return shard_statistics_ref(rows, weight, bias, targets, shard, sampling)
    keys, *how = sampling or (None, 1.0, False)
    return vocabulary_statistics(rows, weight, bias, targets, keys, *shard, *how)


def shard_loss(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard, statistics: Statistics
) -> Tensor:
    """statistics.loss [M], differentiable in rows, weight and bias of this shard. Arguments as above."""
    _check(rows, weight, bias, targets, shard, None)
    for name, x in (("loss", statistics.loss), ("lse", statistics.lse)):
        if x.shape != targets.shape or x.device != rows.device:
            raise ValueError(
                f"statistics.{name} is {list(x.shape)} on {x.device}; it must be {list(targets.shape)} on {rows.device}"
            )
    if not use_kernel("linear_cross_entropy", rows, weight):
        return shard_loss_ref(rows, weight, bias, targets, shard, statistics)
    return vocabulary_loss(rows, weight, bias, targets, statistics.lse, statistics.loss, *shard[:2])


def _check(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shard: VocabularyShard,
    sampling: Sampling | None,
) -> None:  # fmt: skip
    """Raise ValueError for what no kernel could notice; reads no tensor on a GPU."""
    if rows.dim() != 2 or weight.dim() != 2 or rows.size(1) != weight.size(1):
        raise ValueError(f"rows is {list(rows.shape)} and weight {list(weight.shape)}; they must be [M, H] and [V, H]")
    count, size = rows.size(0), weight.size(0)
    wanted = [("weight", weight, (size, rows.size(1)), rows.dtype), ("targets", targets, (count,), torch.int64)]
    wanted += [] if bias is None else [("bias", bias, (size,), rows.dtype)]
    wanted += [] if sampling is None else [("sampling.keys", sampling.keys, (count, 2), torch.int32)]
    for name, x, shape, dtype in wanted:
        if x.shape != shape or x.dtype != dtype or x.device != rows.device:
            raise ValueError(f"{name} is {list(x.shape)} {x.dtype} on {x.device}; it must be {list(shape)} {dtype} "
                             f"on {rows.device}")  # fmt: skip
    if sampling is not None and not 0 < sampling.temperature < math.inf:
        raise ValueError(f"sampling.temperature is {sampling.temperature}; it must be positive and finite")
    if rows.dtype not in DTYPES:
        raise ValueError(f"rows is {rows.dtype}; it must be one of {DTYPES}")
    first, vocab_size, num_specials, scattered = shard
    if not 0 < vocab_size <= MOST_IDS:
        raise ValueError(f"shard.vocab_size is {vocab_size}; it must be in 1..{MOST_IDS}")
    if first < 0 or not 0 <= num_specials < vocab_size:
        raise ValueError(f"shard.first is {first} and shard.num_specials {num_specials}; they must be at least 0, and "
                         f"num_specials below vocab_size {vocab_size}")  # fmt: skip
    if not all(num_specials <= one < vocab_size for one in scattered):
        raise ValueError(f"shard.scattered is {scattered}; ids must be in {num_specials}..{vocab_size - 1}")
    if targets.device.type == "cpu" and count and not torch.compiler.is_compiling():
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"targets has ids {lowest}..{highest}; they must be in 0..{vocab_size - 1}")


def _chunks(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The ids of each chunk and its logits [M, C] in one memory for all chunks: use them before the next."""
    count, size = rows.size(0), weight.size(0)
    memory = rows.new_empty(count * min(CHUNK, size))
    for begin in range(0, size, CHUNK):
        ids = slice(begin, min(begin + CHUNK, size))
        # The last chunk may be narrower: its rows are packed anew, since the kernels take rows without gaps.
        logits = memory[: count * (ids.stop - begin)].view(count, -1) if count else memory.view(0, ids.stop - begin)
        if bias is None:
            torch.mm(rows, weight[ids].t(), out=logits)
        else:
            torch.addmm(bias[ids], rows, weight[ids].t(), out=logits)
        yield ids, logits


def _real(ids: slice, first: int, vocab_size: int) -> int:
    """How many ids of a chunk do not pad the vocabulary."""
    return min(max(vocab_size - first - ids.start, 0), ids.stop - ids.start)


def _statistics_launch(
    logits: Tensor, targets: Tensor, sampling: Sampling | None, out: Tensor, chunk: tuple[int, int], num_specials: int,
    scattered: Tensor | None = None,
) -> Launch:  # fmt: skip
    """chunk: its first id, and how many of its ids are real; scattered: of its ids, as the kernel takes it."""
    keys, temperature, disallow_correct = sampling or (None, 1.0, False)
    arguments: dict[str, Any] = {
        "Logits": logits,
        "Targets": targets,
        "Keys": keys,
        "Scattered": scattered,
        "Out": out,
        "first": chunk[0],
        "real": chunk[1],
    }
    arguments |= {"width": logits.size(1), "num_rows": logits.size(0), "num_specials": num_specials, "slack": SLACK}
    arguments |= {"temperature": temperature, "BLOCK": PIECE, "NOISE": keys is not None}
    arguments |= {"TEMPERED": temperature != 1.0, "OTHER": disallow_correct}
    return Launch(statistics_kernel, (logits.size(0), out.size(0)), arguments, num_warps=8)


@cache
def _scattered(columns: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """int8 [width], 1 in these columns; kept, as every step asks for the same ones."""
    found = torch.zeros(width, dtype=torch.int8)
    found[list(columns)] = 1
    return found.to(device)


@torch.library.custom_op("fused::vocabulary_statistics", mutates_args=())
def vocabulary_statistics(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, noise_keys: Tensor | None, first: int,
    vocab_size: int, num_specials: int, scattered: Sequence[int], temperature: float = 1.0,
    disallow_correct: bool = False,
) -> Tensor:  # fmt: skip
    """Launch the statistics of every chunk; see `shard_statistics`. No gradient."""
    # One operator for the whole loop over chunks: torch.compile and the autograd see a single node, and the launches
    # inside follow the products on the same stream, so that a chunk is read before the next overwrites it.
    targets = targets.contiguous()
    sampling = None if noise_keys is None else Sampling(noise_keys.contiguous(), temperature, disallow_correct)
    numbers, parts = 5 if sampling is None else 7, []
    for ids, logits in _chunks(rows, weight, bias):
        part = rows.new_empty(-(-logits.size(1) // PIECE), numbers, rows.size(0), dtype=torch.float32)
        chunk = (first + ids.start, _real(ids, first, vocab_size))
        own = [one - chunk[0] for one in scattered if chunk[0] <= one < chunk[0] + logits.size(1)]
        special = _scattered(tuple(own), logits.size(1), logits.device) if own and sampling else None
        _statistics_launch(logits, targets, sampling, part, chunk, num_specials, special).start()
        parts.append(part)
    return merge(torch.cat(parts))  # pieces in the order of their ids: of equal logits the smallest id wins


@vocabulary_statistics.register_fake
def _(rows, weight, bias, targets, noise_keys, *_):
    return rows.new_empty(5 if noise_keys is None else 7, rows.size(0), dtype=torch.float32)


def _gradient_launch(
    logits: Tensor, targets: Tensor, lse: Tensor, grad_loss: Tensor, sums: Tensor, chunk: tuple[int, int]
) -> Launch:
    """chunk: its first id, and how many of its ids are real."""
    count, width = logits.shape
    block, tile_rows = GRADIENT_TILE
    arguments: dict[str, Any] = {"Logits": logits, "Targets": targets, "Lse": lse, "GradLoss": grad_loss, "Sums": sums}
    arguments |= {"first": chunk[0], "real": chunk[1], "width": width, "num_rows": count}
    arguments |= {"BLOCK": block, "ROWS": tile_rows}
    return Launch(gradient_kernel, (-(-width // block), sums.size(0)), arguments)


@torch.library.custom_op("fused::vocabulary_gradients", mutates_args=())
def vocabulary_gradients(
    grad_loss: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, first: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows (summed over chunks in FP32), of weight, and of bias (empty where there is none)."""
    # FP32, since every chunk adds to it; each row of weight belongs to one chunk and gets its gradient in one product.
    grad_rows = torch.zeros_like(rows, dtype=torch.float32, memory_format=torch.contiguous_format)
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(0 if bias is None else bias.size(0))  # an operator cannot return None for a Tensor
    grad_loss, targets, lse = grad_loss.contiguous(), targets.contiguous(), lse.contiguous()
    # The order matters: the kernel turns the chunk's logits into their gradient in place, and the products read that.
    for ids, logits in _chunks(rows, weight, bias):
        sums = rows.new_empty(-(-rows.size(0) // GRADIENT_TILE[1]), logits.size(1), dtype=torch.float32)
        chunk = (first + ids.start, _real(ids, first, vocab_size))
        _gradient_launch(logits, targets, lse, grad_loss, sums, chunk).start()
        grad_rows += logits @ weight[ids]
        torch.mm(logits.t(), rows, out=grad_weight[ids])
        if bias is not None:
            grad_bias[ids] = sums.sum(0)
    return grad_rows.to(rows.dtype), grad_weight, grad_bias


@vocabulary_gradients.register_fake
def _(grad_loss, rows, weight, bias, targets, lse, first, vocab_size):
    grad_bias = weight.new_empty(0 if bias is None else bias.size(0))
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape), grad_bias


@torch.library.custom_op("fused::vocabulary_loss", mutates_args=())
def vocabulary_loss(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, loss: Tensor, first: int,
    vocab_size: int,
) -> Tensor:  # fmt: skip
    """The loss that is already known, with the gradients of `vocabulary_gradients`."""
    # Forward computes nothing: the loss needs all shards' statistics, which are exchanged between the two operators.
    # A copy, since an operator that torch.library makes may not return its argument.
    return loss.clone()


@vocabulary_loss.register_fake
def _(rows, weight, bias, targets, lse, loss, first, vocab_size):
    return torch.empty_like(loss)


def _setup(ctx, inputs, output):
    # rows, weight, bias, targets and lse, all of which exist anyway: the logits are computed again from the first
    # three, and with lse softmax needs no second pass over them. The loss itself is not needed.
    ctx.save_for_backward(*inputs[:5])
    ctx.shard = inputs[6:]


def _backward(ctx, grad_loss):
    rows, weight, bias, targets, lse = ctx.saved_tensors
    gradients = vocabulary_gradients(grad_loss, rows, weight, bias, targets, lse, *ctx.shard)
    # No gradient for targets, lse, loss, first, vocab_size: lse's part is in softmax already.
    return gradients[0], gradients[1], None if bias is None else gradients[2], *[None] * 5


vocabulary_loss.register_autograd(_backward, setup_context=_setup)


def compile_cases() -> list[CompileCase]:
    """The kernels on the second chunk of a row; hidden sizes and shards change only torch's products."""
    count = int(0.15 * ROW_TOKENS)
    logits = meta(count, CHUNK, dtype=torch.bfloat16)
    targets, keys = meta(count, dtype=torch.int64), meta(count, 2, dtype=torch.int32)
    per_row, numbers = meta(count, dtype=torch.float32), meta(2, 7, count, dtype=torch.float32)
    chunk = (CHUNK, CHUNK)
    launches = {
        "statistics and sample": _statistics_launch(logits, targets, Sampling(keys), numbers, chunk, 5),
        "statistics and tempered sample of another id": _statistics_launch(
            logits, targets, Sampling(keys, 2.0, True), numbers, chunk, 5
        ),
        "statistics": _statistics_launch(logits, targets, None, numbers, chunk, 5),
        "gradient": _gradient_launch(logits, targets, per_row, per_row, meta(77, CHUNK, dtype=torch.float32), chunk),
    }
    return [
        CompileCase(f"linear_cross_entropy, {name}", launch, architecture)
        for architecture in ARCHITECTURES
        for name, launch in launches.items()
    ]
