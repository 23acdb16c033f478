"""The kernels, in the interpreter, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused.dropout import keep
from fused.softmax_dropout import CompactBias, Dropout, softmax_dropout, softmax_dropout_ref
from fused.softmax_dropout import operator as module
from fused.softmax_dropout.operator import softmax_dropout_forward
from tests.fused.draws import Draws, arriving
from tests.fused.tolerances import assert_close

SCALE = 0.3


def make(samples, heads, length, reach=3, dtype=torch.float32):
    """Scores, distances, cls and is_key; the last of several samples has no key."""
    draws = Draws(samples * length + reach)
    shapes = (samples, heads, length, length), (heads, 2 * reach + 1), (heads, 2)
    scores, distances, cls = (draws.normal(*shape) for shape in shapes)
    is_key = draws.uniform(samples, length) < 0.8
    is_key[:, 0] = True
    is_key[-1:] = samples == 1
    return [scores.to(dtype), distances, cls, is_key]


def dropping(samples, rate=0.3):
    return Dropout(rate, torch.tensor([77]), torch.arange(samples) * (2**33 + 5) - 11, 3)


def run(function, parts, dropout=None, dtype=None):
    """Probabilities and gradients of scores, distances and cls; the arriving gradient is exact in every type."""
    *leaves, is_key = parts
    scores, distances, cls = (part.detach().to(dtype or part.dtype).requires_grad_() for part in leaves)
    p = function(scores, CompactBias(distances, cls), is_key, SCALE, dropout)
    loss = (p.double() * arriving(p.shape)).sum()
    return [p.detach(), *torch.autograd.grad(loss, [scores, distances, cls])]


def agree(parts, rate=0.0):
    dropout = dropping(len(parts[0]), rate) if rate else None
    got = run(softmax_dropout, parts, dropout)
    for part, wanted in zip(got, run(softmax_dropout_ref, parts, dropout, torch.float64), strict=True):
        assert_close(part, wanted, parts[0].dtype)
    return got


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("samples, heads, length, reach", [(1, 1, 1, 0), (3, 2, 8, 3), (1, 2, 17, 40), (2, 1, 33, 0)])
def test_values_and_gradients(samples, heads, length, reach, rate):
    agree(make(samples, heads, length, reach), rate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    parts = make(2, 2, 16, dtype=dtype)
    got = agree(parts, 0.1)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32


@pytest.mark.long
@pytest.mark.parametrize("block", [32, 512])
def test_blocks_of_other_sizes(monkeypatch, block):
    monkeypatch.setattr(module, "row_block", lambda columns: block)
    agree(make(2, 1, 20, 5), 0.2)


@pytest.mark.long
@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 2), st.integers(1, 8), st.integers(0, 9), st.sampled_from([0.0, 0.5]))
def test_random_shapes(samples, heads, length, reach, rate):
    agree(make(samples, heads, length, reach), rate)


def test_extreme_scores():
    """All equal, at the largest half, and with one key that takes everything."""
    for row in (torch.zeros(9), torch.full((9,), 65504.0), torch.tensor([-65504.0] * 4 + [65504.0] + [0.0] * 4)):
        parts = make(1, 1, 9)
        agree([row.expand(1, 1, 9, 9).half(), *parts[1:]])


def test_padding_gets_no_probability_and_no_gradient():
    parts = make(3, 1, 6)
    p, grad_scores, _, _ = agree(parts, 0.3)
    hidden = ~parts[3][:2, None, None, :].expand(2, 1, 6, 6)
    assert (p[:2][hidden] == 0).all() and (grad_scores[:2][hidden] == 0).all()
    assert torch.isfinite(p).all() and (grad_scores[2] == 0).all()


def test_the_mask_of_forward_is_that_of_backward_and_of_attention():
    parts, dropout = [*make(4, 2, 9)[:3], torch.ones(4, 9, dtype=torch.bool)], dropping(4)
    scores = parts[0].requires_grad_()
    p = softmax_dropout(scores, CompactBias(*parts[1:3]), parts[3], SCALE, dropout)
    kept = keep(dropout, 2, 9)
    assert torch.equal(p != 0, kept)
    (gradient,) = torch.autograd.grad(p[0, 0, 0].sum(), scores)
    plain = softmax_dropout(scores, CompactBias(*parts[1:3]), parts[3], SCALE)[0, 0, 0].detach()
    grad_p = kept[0, 0, 0] * dropout.keep_scale
    wanted = SCALE * plain * (grad_p - (plain * grad_p).sum())
    torch.testing.assert_close(gradient[0, 0, 0], wanted, atol=1e-6, rtol=0)


def test_layout_on_the_gpu_changes_nothing(monkeypatch):
    parts = make(5, 1, 6)
    before = agree(parts, 0.3)
    assert all(torch.equal(*both) for both in zip(before, run(softmax_dropout, parts, dropping(5)), strict=True))
    monkeypatch.setattr(module, "FORWARD_SAMPLES", 2)
    monkeypatch.setattr(module, "BACKWARD_SAMPLES", 3)
    monkeypatch.setattr(module, "DIAGONAL_TILE", (4, 8))
    after = agree(parts, 0.3)
    assert all(torch.equal(*both) for both in zip(before[:2], after[:2], strict=True))


def test_a_dense_term_is_added_by_the_reference():
    """With every gradient, where the whole bias is a term of it."""
    scores, distances, cls, is_key = make(2, 2, 6)
    distances, cls = distances * 0, cls * 0
    term = Draws(2).normal(2, 6, 6).requires_grad_()
    p = softmax_dropout(scores, CompactBias(distances, cls), is_key, SCALE, dropping(2), term)
    exact = (scores * SCALE + term).masked_fill(~is_key[:, None, None], -1e30).softmax(-1)
    exact = exact * keep(dropping(2), 2, 6) * dropping(2).keep_scale
    torch.testing.assert_close(p, exact)
    for one in zip(*(torch.autograd.grad((x * scores).sum(), term) for x in (p, exact)), strict=True):
        torch.testing.assert_close(*one)


def test_reference_is_the_softmax_of_the_sum():
    scores, distances, cls, _ = make(1, 2, 6)
    bias = CompactBias(distances, cls)
    wanted = (scores * SCALE + bias.expand(6)).softmax(-1)
    every = torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(softmax_dropout_ref(scores, bias, every, SCALE), wanted)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_operator_obeys_torch(is_dropped):
    dropout = dropping(2) if is_dropped else (0.0, None, None, 0)
    *leaves, is_key = make(2, 2, 5)
    arguments = (*(part.requires_grad_() for part in leaves), is_key, SCALE, *dropout)
    torch.library.opcheck(softmax_dropout_forward, arguments)


def test_compilers_see_one_operator():
    graphs = []
    scores, distances, cls, is_key = make(2, 2, 5)
    compiled = torch.compile(
        lambda x: softmax_dropout(x, CompactBias(distances, cls), is_key, SCALE),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    torch.testing.assert_close(compiled(scores), run(softmax_dropout, [scores, distances, cls, is_key])[0])
    assert len([node for node in graphs[0].graph.nodes if "fused" in str(node.target)]) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: {"scores": torch.zeros(2, 5, 5)}, r"scores is \[2, 5, 5\]"),
        (lambda: {"scores": torch.zeros(2, 2, 4, 5)}, r"scores is \[2, 2, 4, 5\]"),
        (lambda: {"scores": torch.zeros(2, 2, 5, 5, dtype=torch.int32)}, "scores is .* torch.int32"),
        (lambda: {"is_key": torch.ones(2, 4, dtype=torch.bool)}, r"is_key is \[2, 4\]"),
        (lambda: {"is_key": torch.ones(2, 5)}, "is_key is .* torch.float32"),
        (lambda: {"is_key": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "on meta"),
        (lambda: {"bias": CompactBias(torch.zeros(3, 5), torch.zeros(2, 2))}, r"bias.distances is \[3, 5\]"),
        (lambda: {"term": torch.zeros(2, 4, 5)}, r"term is \[2, 4, 5\]"),
        (lambda: {"dropout": dropping(2, -0.5)}, "dropout is -0.5"),
        (lambda: {"dropout": dropping(3)}, r"dropout.keys is \[3\]"),
        (lambda: {"dropout": dropping(2)._replace(seed=torch.tensor(1))}, r"seed is \[\]"),
    ],
)
def test_bad_input_is_named(change, message):
    scores, distances, cls, is_key = make(2, 2, 5)
    given = {"scores": scores, "bias": CompactBias(distances, cls), "is_key": is_key, "scale": SCALE}
    with pytest.raises(ValueError, match=message):
        softmax_dropout(**{**given, **change()})
