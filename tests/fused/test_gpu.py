"""What only a GPU shows: matrix units at the presets' tiles, memory, and that no operator waits for the device."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused.attention import CompactBias, Dropout, attention, packed_samples
from fused.layer_norm import RowDropout, layer_norm
from fused.linear_cross_entropy import Sampling, VocabularyShard, linear_cross_entropy
from fused.softmax_dropout import softmax_dropout
from tests.fused import test_attention, test_layer_norm, test_linear_cross_entropy, test_softmax_dropout
from tests.fused.draws import Draws
from tests.fused.tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


# Tensor cores multiply tiles of these shapes, with wgmma on H100; the reference in float64 is another program.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim, term", [(64, False), (64, True), (32, False), (128, False), (128, True)])
def test_attention_on_tensor_cores(dtype, head_dim, term):
    """Full samples of 512, ragged ones and absent ones, with dropout and every gradient."""
    samples = test_attention.packed((512, 511, 0, 129, 1, 64))
    parts = test_attention.make(1230, 512, head_dim, 509, term, 3, dtype)
    agree(parts, samples, test_attention.dropping(samples))
    agree(parts, samples)


def agree(parts, samples, dropout=None):
    """Output and gradients as those of float64, which takes the reference."""
    got = test_attention.run(attention, parts, samples, dropout)
    wanted = test_attention.run(attention, [part.double() for part in parts], samples, dropout)
    # The gradients of [CLS]'s row add up to 0. What is left is the output's rounding, one for each sample and dimension
    # of a head, which is more than a result's own: 2.4e-3 for FP16 at K 128.
    *cls, atol = got.pop(5).double(), wanted.pop(5), 4 * TOLERANCES[parts[0].dtype][0]
    torch.testing.assert_close(*cls, atol=atol, rtol=atol)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, parts[0].dtype)


def test_attention_of_padded_samples_on_tensor_cores():
    samples = test_attention.padded_samples(torch.tensor([512, 300, 0, 77]), 512)
    parts = test_attention.make(4 * 512, 512, 64, 128, False, 3, torch.bfloat16)
    agree(parts, samples, test_attention.dropping(samples))


@pytest.mark.parametrize("hidden", [768, 1024, 1536, 2560])
def test_layer_norm_of_the_presets(hidden):
    parts = test_layer_norm.make(4000, hidden, dtype=torch.bfloat16)
    test_layer_norm.agree(parts, 0.1)
    test_layer_norm.agree(parts, 0.1, is_last=True)


def test_softmax_dropout_of_the_presets():
    test_softmax_dropout.agree(test_softmax_dropout.make(20, 12, 512, 509, torch.bfloat16), 0.1)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.4, "disallow_correct": True}])
def test_vocabulary_head_of_the_presets(how):
    """Three chunks, the last one narrower and with padding; tolerance of bfloat16's logits."""
    parts, targets, keys = test_linear_cross_entropy.make(500, 768, 20_480, 20_400, torch.bfloat16)
    shard = VocabularyShard(0, 20_400, 5)
    test_linear_cross_entropy.agree(parts, targets, shard, keys, 3e-2, **how)


# Whole operators, forward and backward.


def of_attention() -> Callable[[], list[Tensor]]:
    q, k, v = Draws(0).normal(16_384, 12, 3, 64).bfloat16().unbind(2)
    leaves = [part.requires_grad_() for part in (q.detach(), k.detach(), v.detach(), *table(12))]
    boundaries = torch.arange(33) * 512
    dropout = Dropout(0.1, torch.tensor([3]), torch.arange(32))

    def step() -> list[Tensor]:
        out = attention(*leaves[:3], CompactBias(*leaves[3:]), packed_samples(boundaries, 512), dropout)
        return list(torch.autograd.grad(out, leaves, torch.ones_like(out)))

    return step


def table(heads: int) -> list[Tensor]:
    return [Draws(1).normal(heads, 255), Draws(2).normal(heads, 2)]


def of_layer_norm() -> Callable[[], list[Tensor]]:
    parts = {name: part.requires_grad_() for name, part in test_layer_norm.make(16_384, 768).items()}
    dropout = RowDropout(0.1, torch.tensor([3]), torch.arange(16_384))

    def step() -> list[Tensor]:
        y = layer_norm(**parts, eps=1e-5, dropout=dropout)
        return list(torch.autograd.grad(y, list(parts.values()), torch.ones_like(y)))

    return step


def of_softmax_dropout() -> Callable[[], list[Tensor]]:
    scores = Draws(0).normal(32, 12, 512, 512).bfloat16().requires_grad_()
    bias, is_key = CompactBias(*(part.requires_grad_() for part in table(12))), torch.ones(32, 512, dtype=torch.bool)
    dropout = Dropout(0.1, torch.tensor([3]), torch.arange(32))

    def step() -> list[Tensor]:
        p = softmax_dropout(scores, bias, is_key, 0.125, dropout)
        return list(torch.autograd.grad(p, [scores, *bias], torch.ones_like(p)))

    return step


def of_head() -> Callable[[], list[Tensor]]:
    parts, targets, keys = test_linear_cross_entropy.make(2457, 768, 128_000, 127_990, torch.bfloat16)
    leaves, shard = [part.requires_grad_() for part in parts], VocabularyShard(0, 127_990, 5)

    def step() -> list[Tensor]:
        statistics = linear_cross_entropy(*leaves, targets, shard, Sampling(keys))
        loss = statistics.loss
        return list(torch.autograd.grad(loss, leaves, torch.ones_like(loss)))

    return step


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, torch raises where a call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operator", [of_attention, of_layer_norm, of_softmax_dropout, of_head])
def test_operators_neither_wait_nor_change_from_run_to_run(operator):
    step = operator()
    first = step()  # compiles, and takes memory
    with no_waiting():
        second = step()
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "operator, limit",
    [
        (of_attention, 32 * 12 * 512 * 512 * 2),  # the probabilities alone in half precision
        (of_head, 2457 * 128_000 * 2 // 2),  # half of the logits; the gradient of the weight is 197 MB of it
    ],
)
def test_what_is_never_stored_takes_no_memory(operator, limit):
    step = operator()
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < limit


@pytest.mark.long
def test_no_kernel_leaves_its_memory():
    """The tests with awkward shapes under NVIDIA's memory checker, in allocations of their own."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not in PATH")
    command = [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    chosen = "test_packed_samples or test_awkward_shapes or test_values_and_gradients"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, "tests/fused", "-k", chosen, "-m", "not long", "-p", "no:xdist", "-o", "timeout=0"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
