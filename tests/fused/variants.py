"""Counts the variants that Triton would compile for launches; run by test_variants.py without the interpreter.

The driver here knows a GPU's target and starts nothing: what is counted is Triton's own specialisation of arguments.
"""

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fused.ahead_of_time import meta
from fused.attention.launches import Inputs, backward_launches, forward_launch
from fused.dispatch import Launch
from fused.layer_norm import operator as layer_norm
from fused.linear_cross_entropy import Sampling
from fused.linear_cross_entropy import operator as head
from fused.softmax_dropout import operator as softmax

BF16, FP32, INT32, INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
COUNTS = (1, 2, 16, 17, 30, 48, 100, 2401, 2416, 2457, 16_384)
"""Rows, samples or positions: 1, and those that 16 divides and does not, which Triton tells apart."""


def main() -> None:
    """Print each kernel with its number of variants over all COUNTS."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    found: dict[str, set[str]] = {}

    def do_compile(self: JITFunction, key: str, *rest: object) -> object:
        found.setdefault(self.__module__ + "." + self.__name__, set()).add(key)
        self.device_caches[0][0][key] = compiled
        return compiled

    compiled = object()
    JITFunction._do_compile = do_compile
    for count in COUNTS:
        for launch in (*of_layer_norm(count), *of_head(count), *of_attention(count), *of_softmax(count)):
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            launch.kernel.warmup(**launch.arguments, **options, grid=launch.grid)
    for name, keys in sorted(found.items()):
        print(name.removeprefix("fused."), len(keys))


def sliced(count: int, *rest: int, dtype: torch.dtype) -> Tensor:
    """[count, ...] of a larger tensor, beginning anywhere."""
    return torch.empty(count + 1, *rest, dtype=dtype)[1:]


def of_layer_norm(rows: int) -> Iterable[Launch]:
    x, vector, keys = meta(rows, 768, dtype=BF16), meta(768, dtype=BF16), sliced(rows, dtype=INT64)
    seed = sliced(1, dtype=INT64)
    outputs = y, _, mean, rstd = layer_norm._forward_outputs(x, True)
    yield layer_norm._forward_launch([x, x, vector, vector, vector, seed, keys], outputs, 1e-5, 0.1, False, 90)
    gradients = layer_norm._backward_outputs(x, vector, vector, vector, True)
    yield from layer_norm._backward_launches([y, x, mean, rstd, vector, seed, keys], gradients, 0.1, 90, 132)


def of_head(rows: int) -> Iterable[Launch]:
    logits, targets, keys = meta(rows, 8000, dtype=BF16), sliced(rows, dtype=INT64), sliced(rows, 2, dtype=INT32)
    per_row = sliced(rows, dtype=FP32)
    for first in (0, 8000, 8001):
        chunk = (first, 8000)
        numbers, sums = meta(2, 7, rows, dtype=FP32), meta(-(-rows // 32), 8000, dtype=FP32)
        yield head._statistics_launch(logits, targets, Sampling(keys), numbers, chunk, 5)
        yield head._gradient_launch(logits, targets, per_row, per_row, sums, chunk)


def of_attention(samples: int) -> Iterable[Launch]:
    """Packed samples, as many and as long as the count says, with a term of one size."""
    q, k, v = meta(1024, 12, 3, 64, dtype=BF16).unbind(2)
    out, lse = meta(1024, 12, 64, dtype=BF16), meta(1024, 12, dtype=FP32)
    distances, cls, term = meta(12, 1021, dtype=FP32), meta(12, 2, dtype=FP32), meta(12, 16_384, 16_384, dtype=BF16)
    begin, length = sliced(samples, dtype=INT64), sliced(samples, dtype=INT32)
    seed, keys = sliced(1, dtype=INT64), sliced(samples, dtype=INT64)
    inputs = Inputs(q, k, v, distances, cls, term, begin, length, seed, keys, samples, 1, 0.1, 0)
    yield forward_launch(inputs, out, lse, 90)
    gradients = [q.new_empty(1024, 12, 3, 64), distances, cls, term]
    yield from backward_launches(inputs, [out, lse, out], gradients, 90).values()


def of_softmax(count: int) -> Iterable[Launch]:
    """Up to 256 positions have one size of a block; 16 divides their number or not, which wide loads hang on."""
    samples, length = count, 2 + count % 255
    scores, is_key = meta(samples, 12, length, length, dtype=BF16), meta(samples, length, dtype=torch.bool)
    distances, cls = meta(12, 1021, dtype=FP32), meta(12, 2, dtype=FP32)
    seed, keys = sliced(1, dtype=INT64), sliced(samples, dtype=INT64)
    outputs = softmax._forward_outputs(scores, seed)
    yield softmax._forward_launch([scores, distances, cls, is_key, seed, keys], outputs, 0.125, 0.1, 0, 90)
    yield from softmax._backward_launches([scores, scores, is_key, seed, keys], scores, 0.125, 0.1, 0, 90)


if __name__ == "__main__":
    main()
