"""The kernels, under the interpreter, against the reference in float64."""

import pytest
import torch

from fused import attention_operator
from fused.attention_operator import attention, attention_forward, packed_samples, padded_samples
from fused.attention_reference import Dropout, attention_ref, kept
from fused.relative_bias import CompactBias

# A rounding of the stored output, of size |out| x 2^-11 (fp16) or 2^-8 (bf16), enters every score's gradient.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
LENGTHS = (5, 0, 33, 1, 16)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def make(tokens, longest, head_dim=32, reach=7, term=False, heads=2):
    torch.manual_seed(tokens + head_dim)
    shapes = [(tokens, heads, head_dim)] * 3 + [(heads, 2 * reach + 1), (heads, 2)]
    shapes += [(heads, longest + 2, longest + 2)] if term else []
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def run(function, parts, samples, dropout=None):
    """Output, log-sum-exp and all gradients, with gradients arriving at both outputs."""
    parts = [part.detach().clone().requires_grad_() for part in parts]
    term = parts[5] if len(parts) == 6 else None
    out, lse = function(*parts[:3], CompactBias(*parts[3:5]), samples, dropout, term)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    loss = (out.double() * weight).sum() + (lse.double() * weight[..., 0]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, parts)]


def agree(parts, samples, dtype=torch.float32, dropout=None):
    parts = [part.to(dtype) for part in parts]
    exact = run(attention_ref, [part.double() for part in parts], samples, dropout)
    for got, wanted in zip(run(attention, parts, samples, dropout), exact, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double() / scale, wanted / scale, atol=TOLERANCE[dtype], rtol=0)


def dropping(samples, rate=0.3):
    keys = torch.arange(samples.begin.numel()) * 2**33 + 11
    return Dropout(rate, torch.tensor([2**40 + 5]), keys, 3)


@pytest.mark.parametrize(
    "dtype, head_dim, term",
    [(torch.float32, 32, True), (torch.float16, 64, False), (torch.bfloat16, 128, True)],
)
def test_packed_rows_equal_the_reference(dtype, head_dim, term):
    samples = packed_samples(cumulative(LENGTHS), 33)
    agree(make(60, 33, head_dim, term=term), samples, dtype, dropping(samples))


@pytest.mark.parametrize("side, reach", [(16, 40), (32, 0), (64, 7)])
def test_tiles_change_nothing(monkeypatch, side, reach):
    monkeypatch.setattr(attention_operator, "tile_side", lambda head_dim: side)
    samples = packed_samples(cumulative((17, 33)), 33)
    agree(make(50, 33, reach=reach), samples, dropout=dropping(samples))


def test_padded_rows_equal_the_reference():
    samples = padded_samples(torch.tensor([20, 0, 7]), 20)
    agree(make(60, 20), samples, dropout=dropping(samples))


def test_extreme_values_stay_finite():
    samples = packed_samples(cumulative((20, 1)), 20)
    parts = make(21, 20)
    parts[0], parts[1] = parts[0] * 0 + 100.0, parts[1] * 0 + 100.0
    agree(parts, samples, torch.float16)


def test_strided_inputs_and_repeated_runs_are_equal():
    samples = packed_samples(cumulative((9, 12)), 12)
    parts = [part.float() for part in make(21, 12)]
    together = torch.stack(parts[:3], dim=2)  # [T, N, 3, K], as one projection gives them
    dense = attention(*parts[:3], CompactBias(*parts[3:]), samples)
    strided = attention(*together.unbind(2), CompactBias(*parts[3:]), samples)
    assert torch.equal(dense[0], strided[0])
    first, second = (run(attention, parts, samples, dropping(samples)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_does_not_depend_on_packing_or_on_the_split_of_heads():
    parts = [part.float() for part in make(30, 20)]
    bias = CompactBias(*parts[3:])
    both = packed_samples(cumulative((10, 20)), 20)
    alone = packed_samples(cumulative((20,)), 20)
    dropout = dropping(both)
    packed, _ = attention(*parts[:3], bias, both, dropout)
    second = [part[10:, 1:] for part in parts[:3]]
    split = dropout._replace(keys=dropout.keys[1:], first_head=dropout.first_head + 1)
    single, _ = attention(*second, CompactBias(bias.distances[1:], bias.cls[1:]), alone, split)
    torch.testing.assert_close(packed[10:, 1:], single, atol=1e-6, rtol=0)


def test_dropout_rate():
    dropout = Dropout(0.1, torch.tensor([3]), torch.tensor([5]))
    assert abs(kept(dropout, 0, 4, 200).double().mean() - 0.9) < 0.003  # 4 standard deviations


def test_operator_obeys_torch():
    samples = packed_samples(cumulative((6, 3)), 6)
    parts = [part.float().requires_grad_() for part in make(9, 6)]
    arguments = (*parts, None, samples.begin, samples.length, None, None, 6, 1, 0.0, 0)
    torch.library.opcheck(attention_forward, arguments)


@pytest.mark.parametrize("ends, message", [([1, 4], "start with 0"), ([0, 5, 4], "never fall"), ([0, 9], "9 tokens")])
def test_bad_ends_are_named(ends, message):
    with pytest.raises(ValueError, match=message):
        packed_samples(torch.tensor(ends), 8)


def test_bad_input_is_named():
    samples = packed_samples(cumulative((6,)), 6)
    q, k, v, distances, cls = (part.float() for part in make(6, 6))
    bias = CompactBias(distances, cls)
    for change, message in [
        (lambda: attention(q[..., :20], k[..., :20], v[..., :20], bias, samples), r"q is \[6, 2, 20\]"),
        (lambda: attention(q, k.half(), v, bias, samples), "k is .* torch.float16"),
        (lambda: attention(q, k, v, bias, samples, term=torch.zeros(2, 5, 5)), r"term is \[2, 5, 5\]"),
        (lambda: attention(q, k, v, bias, samples, dropping(samples, 1.0)), "dropout.rate is 1.0"),
        (lambda: attention(q, k, v, bias._replace(cls=cls[:1]), samples), "bias.cls"),
    ]:
        with pytest.raises(ValueError, match=message):
            change()
