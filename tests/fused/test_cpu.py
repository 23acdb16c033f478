"""The CPU's own ways against the references: values, ids and every gradient; equal inputs give equal bits."""

from collections.abc import Iterator

import pytest
import torch

from fused.attention import CompactBias, Dropout, attention, attention_ref, packed_samples, padded_samples
from fused.attention.cpu import attention_cpu
from fused.dispatch import reference_only, use_cpu
from fused.linear_cross_entropy import Sampling, VocabularyShard, linear_cross_entropy
from fused.linear_cross_entropy import operator as head
from tests.fused.tolerances import assert_close


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    """Not the kernels', which the tests beside these take."""
    with torch.device("cpu") as one:
        yield one


PACKED = packed_samples(torch.tensor([0, 5, 5, 14, 21]), 9)  # of 24 tokens, with an empty sample
PADDED = padded_samples(torch.tensor([5, 0, 7]), 8)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "reach, resets_cls, has_term, rate", [(3, True, True, 0.3), (12, False, False, 0.0), (0, False, True, 0.0)]
)
def test_attention_equals_its_reference(dtype, samples, reach, resets_cls, has_term, rate) -> None:
    torch.manual_seed(0)
    qkv = drawn(24, 3, 3, 8, dtype=dtype)
    parts = [qkv] + ([drawn(3, 2 * reach + 1, dtype=dtype)] if reach else [])
    bias = CompactBias(parts[1], drawn(3, 2, dtype=dtype) if resets_cls else None) if reach else None
    term = drawn(3, 11, 11, dtype=dtype) if has_term else None
    parts += [part for part in (bias and bias.cls, term) if part is not None]
    dropout = Dropout(rate, torch.tensor([5]), torch.arange(len(samples.begin)) * 2**33, 2) if rate else None
    weight = torch.randn(24, 3, 8).to(dtype)

    def run(function):
        out = function(*qkv.unbind(2), bias, samples, dropout, term)
        return [out.detach(), *torch.autograd.grad(out, parts, weight)]

    got = run(attention_cpu)
    for one, again, wanted in zip(got, run(attention_cpu), run(attention_ref), strict=True):
        assert torch.equal(one, again)
        assert_close(one, wanted, dtype)


@pytest.mark.parametrize("tokens", [0, 4])
def test_attention_without_samples(tokens) -> None:
    x, bias = drawn(tokens, 3, 8, dtype=torch.float64), CompactBias(torch.zeros(3, 5), torch.zeros(3, 2))
    samples, dropout = packed_samples(torch.tensor([0]), 1), Dropout(0.3, torch.tensor([5]), torch.arange(0))
    out = attention(x, x, x, bias, samples, dropout)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(x)) and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [None, (1.0, False), (0.7, True)])
def test_the_vocabulary_head_equals_its_reference(dtype, sampling) -> None:
    torch.manual_seed(0)
    parts = [drawn(7, 16, dtype=dtype), drawn(40, 16, dtype=dtype), drawn(40, dtype=dtype)]
    targets, shard = torch.randint(37, (7,)), VocabularyShard(0, 37, 5)
    how = sampling and Sampling(torch.randint(-99, 99, (7, 2)).int(), *sampling)
    weight = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def run(function):
        found = function(*parts, targets, shard, how)
        return found, torch.autograd.grad((found.loss.double() * weight).sum(), parts)

    def reference(*given):
        with reference_only("linear_cross_entropy"):
            return linear_cross_entropy(*given)

    (got, gradients), (again, same), (wanted, exact) = map(run, (head.linear_cross_entropy_cpu,) * 2 + (reference,))
    for one, other, true in zip([*got[:3], *gradients], [*again[:3], *same], [*wanted[:3], *exact], strict=True):
        assert torch.equal(one, other)
        assert_close(one, true, dtype)
    assert torch.equal(got.predicted, wanted.predicted)
    assert (got.sampled is None and wanted.sampled is None) or torch.equal(got.sampled, wanted.sampled)


def test_who_takes_it(monkeypatch) -> None:
    """Tensors on the CPU that no kernel takes, unless references are asked for or there are too many logits."""
    x = torch.zeros(4, 1, 8, dtype=torch.float64, requires_grad=True)  # kernels leave FP64 alone
    with reference_only("attention"):
        assert not use_cpu("attention", x)
        assert "Attention" not in type(attention(x, x, x, None, PADDED_ONE).grad_fn).__name__
    assert use_cpu("attention", x) and not use_cpu("attention", x.to("meta"))
    assert "_Attention" in type(attention(x, x, x, None, PADDED_ONE).grad_fn).__name__
    rows, targets = x[:, 0], torch.zeros(4, dtype=torch.int64)
    kept = linear_cross_entropy(rows, rows, None, targets, VocabularyShard(0, 4)).loss
    assert "_LinearCrossEntropy" in type(kept.grad_fn).__name__
    monkeypatch.setattr(head, "MOST_KEPT", 15)
    made_again = linear_cross_entropy(rows, rows, None, targets, VocabularyShard(0, 4)).loss
    assert "_LinearCrossEntropy" not in type(made_again.grad_fn).__name__


PADDED_ONE = padded_samples(torch.tensor([4]), 4)
