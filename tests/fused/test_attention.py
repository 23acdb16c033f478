"""The kernels and the reference against a loop over samples in float64; kernels run in Triton's interpreter."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused.attention import CompactBias, Dropout, attention, attention_qkvpacked, packed_samples, padded_samples
from fused.attention import launches as attention_launches
from fused.attention.launches import Tile
from fused.attention.operator import attention_forward
from fused.dispatch import reference_only
from fused.dropout import keep
from tests.fused.draws import Draws, arriving
from tests.fused.tolerances import assert_close

LENGTHS = (5, 0, 33, 1, 16)


def packed(lengths):
    return packed_samples(torch.tensor([0, *lengths]).cumsum(0), max(1, *lengths))


def make(tokens, longest, head_dim=32, reach=7, term=False, heads=2, dtype=torch.float32):
    """q, k, v, distances, cls and, if asked for, term."""
    draws = Draws(tokens + head_dim)
    shapes = [(tokens, heads, head_dim)] * 3 + [(heads, 2 * reach + 1), (heads, 2)]
    shapes += [(heads, longest + 2, longest + 2)] if term else []
    return [draws.normal(*shape).to(dtype) for shape in shapes]


def dropping(samples, rate=0.3):
    keys = torch.arange(samples.begin.numel()) * (2**33 + 5) - 11
    return Dropout(rate, torch.tensor([2**40 + 5]), keys, 3)


def loop(q, k, v, bias, samples, dropout=None, term=None):
    """attention, one sample and one head at a time."""
    out = torch.zeros_like(q)
    masks = keep(dropout, q.size(1), samples.longest) if dropout else None
    for sample, (begin, length) in enumerate(zip(samples.begin.tolist(), samples.length.tolist(), strict=True)):
        tokens = [begin + position * samples.stride for position in range(length)]
        for head in range(q.size(1)):
            scores = q[tokens, head] @ k[tokens, head].T / q.size(2) ** 0.5
            scores = scores + bias.expand(samples.longest)[head, :length, :length]
            scores = scores if term is None else scores + term[head, :length, :length]
            p = scores.exp() / scores.exp().sum(1, keepdim=True) if length else scores
            p = p if masks is None else p * masks[sample, head, :length, :length] * dropout.keep_scale
            out = out.index_put((torch.tensor(tokens).long(), torch.tensor(head)), p @ v[tokens, head])
    return out


def run(function, parts, samples, dropout=None):
    """Output and all gradients; what arrives at the output is exact in every type."""
    parts = [part.detach().clone().requires_grad_() for part in parts]
    term = parts[5] if len(parts) == 6 else None
    out = function(*parts[:3], CompactBias(*parts[3:5]), samples, dropout, term)
    loss = (out.double() * arriving(out.shape)).sum()
    return [out.detach(), *torch.autograd.grad(loss, parts)]


def agree(parts, samples, dropout=None, exact=loop):
    got = run(attention, parts, samples, dropout)
    for part, wanted in zip(got, run(exact, [part.double() for part in parts], samples, dropout), strict=True):
        assert_close(part, wanted, parts[0].dtype)
    return got


@pytest.mark.parametrize(
    "dtype, head_dim, term",
    [
        (torch.float32, 32, True),
        (torch.float32, 64, False),
        (torch.float16, 64, True),
        (torch.bfloat16, 32, False),
        (torch.bfloat16, 128, True),
    ],
)
def test_packed_samples(dtype, head_dim, term):
    samples = packed(LENGTHS)
    got = agree(make(60, 33, head_dim, term=term, dtype=dtype), samples, dropping(samples))
    assert got[0].dtype == dtype
    assert all((part[55:] == 0).all() for part in got[:4])  # tokens of no sample


@pytest.mark.parametrize("dropout", [False, True])
def test_padded_samples(dropout):
    samples = padded_samples(torch.tensor([20, 0, 7]), 20)
    agree(make(60, 20, term=dropout), samples, dropping(samples) if dropout else None)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65])
def test_lengths_at_the_edges_of_tiles(length):
    agree(make(length, length, heads=1, reach=length % 5 * 20), packed((length,)))


@pytest.mark.parametrize("length", [127, 129])
def test_half_precision_at_the_edges_of_tiles(length):
    agree(make(length, length, heads=1, reach=200, dtype=torch.float16), packed((length,)))


@pytest.mark.long
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(0, 50),
    st.booleans(),
    st.booleans(),
)
def test_random_samples(lengths, heads, reach, is_packed, term):
    longest = max(1, *lengths)
    samples = packed(lengths) if is_packed else padded_samples(torch.tensor(lengths), longest)
    tokens = sum(lengths) if is_packed else longest * len(lengths)
    agree(make(tokens, longest, 32, reach, term, heads), samples, dropping(samples))


@pytest.mark.parametrize("is_packed", [True, False])
def test_reference(is_packed):
    samples = packed(LENGTHS) if is_packed else padded_samples(torch.tensor([12, 0, 5, 1, 7]), 12)
    parts = make(60, samples.longest, 5, term=True, dtype=torch.float64)
    agree(parts, samples, dropping(samples))
    with reference_only():
        agree([part.float() for part in parts], samples, dropping(samples))
        agree([part.bfloat16() for part in parts], samples)


def test_reference_takes_the_kernel_of_softmax_dropout():
    samples, parts = packed((9, 5)), make(14, 9)
    with reference_only("attention"):
        agree(parts, samples, dropping(samples))


def unbiased(parts, samples, dropout=None, term=None):
    """run() without a relative bias: output, and gradients of q, k, v and, if given, of term."""
    given = [part.detach().clone().requires_grad_() for part in (*parts[:3], *([] if term is None else [term]))]
    out = attention(*given[:3], None, samples, dropout, None if term is None else given[3])
    return [out.detach(), *torch.autograd.grad((out.double() * arriving(out.shape)).sum(), given)]


@pytest.mark.parametrize("references", [(), ("attention",), ("attention", "softmax_dropout")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bias_is_a_bias_of_zeros(references, dtype):
    """Kernel and references, with dropout and a term."""
    samples = packed(LENGTHS)
    *parts, term = make(60, 33, term=True, dtype=dtype)
    parts[3:] = [torch.zeros_like(part) for part in parts[3:]]
    for dropout, one_term in ((None, None), (dropping(samples), term)):
        exact = [part.double() for part in (parts if one_term is None else [*parts, term])]
        out, *grads = run(loop, exact, samples, dropout)
        with reference_only(*references) if references else nullcontext():
            got = unbiased(parts, samples, dropout, one_term)
        for part, wanted in zip(got, [out, *grads[:3], *grads[5:]], strict=True):
            assert_close(part, wanted, dtype)


@pytest.mark.parametrize("references", [(), ("attention",)])
def test_no_bias_equals_torch(references):
    """scaled_dot_product_attention of one sample at a time, with its gradients."""
    samples, parts = packed((9, 33)), make(42, 33)[:3]
    parts = [part.requires_grad_() for part in parts]
    with reference_only(*references) if references else nullcontext():
        out = attention(*parts, None, samples)
    samplewise = zip(*(part.double().split([9, 33]) for part in parts), strict=True)
    wanted = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sample)).transpose(0, 1)
            for sample in samplewise
        ]
    )
    assert_close(out.detach(), wanted.detach(), torch.float32)
    weight = Draws(2).normal(*out.shape)
    got, exact = (torch.autograd.grad((x * weight).sum(), parts) for x in (out, wanted))
    for one, two in zip(got, exact, strict=True):
        assert_close(one, two, torch.float32)


@pytest.mark.parametrize("references", [(), ("attention",), ("attention", "softmax_dropout")])
@pytest.mark.parametrize("reach, term", [(0, False), (9, True), (40, False)])
def test_position_0_may_be_like_all_others(references, reach, term):
    """A bias without [CLS]'s part: the loop over samples reads it through expand()."""
    samples = packed(LENGTHS)
    parts = make(60, 33, reach=reach, term=term)
    del parts[4]

    def without_cls(function, parts):
        q, k, v, distances, *rest = (part.detach().clone().requires_grad_() for part in parts)
        out = function(q, k, v, CompactBias(distances, None), samples, dropping(samples), *rest)
        return [out, *torch.autograd.grad((out * arriving(out.shape)).sum(), (q, k, v, distances, *rest))]

    with reference_only(*references) if references else nullcontext():
        got = without_cls(attention, parts)
    for part, wanted in zip(got, without_cls(loop, [part.double() for part in parts]), strict=True):
        assert_close(part, wanted, torch.float32)


@pytest.mark.parametrize("references", [(), ("attention",)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_without_samples_every_gradient_is_zero(rate, references):
    for samples in (packed((0, 0)), packed_samples(torch.tensor([0]), 1)):
        with reference_only(*references) if references else nullcontext():
            got = run(attention, make(4, 1, term=True), samples, dropping(samples, rate))
        assert all((part == 0).all() for part in got)


@pytest.mark.parametrize("value", [0.0, 40.0, 240.0])
def test_equal_scores_up_to_the_largest_half(value):
    """q k^T reaches 32 value^2 = 1.8 million; probabilities are equal, whatever the size of the scores."""
    parts = make(21, 20, reach=0, dtype=torch.float16)
    parts[:2] = [torch.full_like(part, value) for part in parts[:2]]
    parts[3:] = [torch.zeros_like(part) for part in parts[3:]]
    samples = packed((20, 1))
    begin, length, longest, stride = samples
    out, lse = attention_forward(*parts, None, begin, length, None, None, longest, stride, 0.0, 0)
    assert_close(out[:20], parts[2][:20].double().mean(0).expand(20, -1, -1), torch.float16)
    assert_close(lse[:20], torch.full((20, 2), 32**0.5 * value**2 + torch.tensor(20.0).log()), torch.float32)
    assert all(torch.isfinite(part).all() for part in run(attention, parts, samples))


def test_strided_inputs_and_repeated_runs_are_equal():
    samples, parts = packed((9, 12)), make(21, 12)
    together = torch.stack(parts[:3], dim=2)  # [T, N, 3, K], as one projection gives them
    dense = attention(*parts[:3], CompactBias(*parts[3:]), samples)
    assert torch.equal(dense, attention(*together.unbind(2), CompactBias(*parts[3:]), samples))
    first, second = (run(attention, parts, samples, dropping(samples)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_packed_inputs_get_one_gradient():
    samples, parts = packed((9, 12)), make(21, 12)
    separate = run(attention, parts, samples, dropping(samples))
    qkv = torch.stack(parts[:3], dim=2).requires_grad_()
    bias = [part.requires_grad_() for part in parts[3:]]
    out = attention_qkvpacked(qkv, CompactBias(*bias), samples, dropping(samples))
    grad_qkv, *others = torch.autograd.grad((out.double() * arriving(out.shape)).sum(), (qkv, *bias))
    for one, two in zip(separate, (out, *grad_qkv.unbind(2), *others), strict=True):
        assert torch.equal(one, two)
    with reference_only():
        assert_close(attention_qkvpacked(qkv, CompactBias(*bias), samples, dropping(samples)), out, torch.float32)


def test_memory_that_no_kernel_wrote_is_not_read():
    """Samples of many lengths leave gaps in everything that is not filled with zeros: here with NaN."""
    samples, parts = packed(LENGTHS), make(60, 33, term=True)
    # Has torch fill new memory; raises nothing, as it would for the products of the loop on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        agree(parts, samples, dropping(samples))
    finally:
        torch.use_deterministic_algorithms(False)


def dropped(samples, dropout, tokens):
    """Where probabilities are 0, [n, N, L, L]: the kernel's output for values that are rows of the identity."""
    q, _, v, *bias = make(tokens, samples.longest, reach=2, heads=2)
    q, v = torch.zeros_like(q), torch.zeros_like(v)
    position = torch.arange(samples.longest)
    token = samples.begin[:, None] + position * samples.stride
    inside = position < samples.length[:, None]
    v[token[inside]] = torch.eye(32)[position.expand_as(token)[inside]][:, None]
    out = attention(q, q, v.requires_grad_(), CompactBias(*bias), samples, dropout)
    ones = torch.zeros(len(token), 2, samples.longest, 32)
    ones.transpose(1, 2)[inside] = out.detach()[token[inside]]
    return out, v, ones[..., : samples.longest] != 0


def test_one_mask_in_kernels_and_torch_for_packing_padding_and_split_heads():
    lengths = torch.tensor([19, 32, 1])
    rows, pads = packed(lengths.tolist()), padded_samples(lengths, 32)
    dropout = dropping(rows)
    mask = keep(dropout, 2, 32)
    there = torch.arange(32) < lengths[:, None]
    wanted = mask & there[:, None, None, :] & there[:, None, :, None]
    for samples, tokens in ((rows, 52), (pads, 96)):
        out, v, kept = dropped(samples, dropout, tokens)
        assert torch.equal(kept, wanted)
        token = samples.begin[1] + torch.arange(32) * samples.stride
        (grad_v,) = torch.autograd.grad(out[token].diagonal(dim1=0, dim2=2).sum(), v)
        assert torch.equal(grad_v[token].permute(1, 2, 0) != 0, wanted[1])
    split = keep(dropout._replace(keys=dropout.keys[1:], first_head=dropout.first_head + 1), 1, 20)
    assert torch.equal(split, mask[1:, 1:, :20, :20])


@pytest.mark.parametrize("name", ["seed", "keys", "first_head"])
def test_masks_differ_by_seed_sample_and_head(name):
    change = {"seed": torch.tensor([4]), "keys": torch.arange(3), "first_head": 9}[name]
    dropout = dropping(packed((5, 5, 5)), 0.5)
    mask, other = (keep(one, 2, 64).double() * 2 - 1 for one in (dropout, dropout._replace(**{name: change})))
    assert abs(float((mask * other).mean())) < 4 / mask.numel() ** 0.5
    assert abs(float((mask[0] * mask[1]).mean())) < 4 / mask[0].numel() ** 0.5
    assert abs(float((mask[:, 0] * mask[:, 1]).mean())) < 4 / mask[:, 0].numel() ** 0.5


@pytest.mark.long
@pytest.mark.parametrize("rows, cols", [(16, 16), (64, 16)])
def test_tiles_change_nothing(monkeypatch, rows, cols):
    samples, parts = packed((17, 33)), make(50, 33, reach=9, term=True)
    before = run(attention, parts, samples, dropping(samples))
    monkeypatch.setattr(attention_launches, "FLOAT32", Tile(rows, cols, 4, 1))
    for one, two in zip(before, run(attention, parts, samples, dropping(samples)), strict=True):
        assert_close(one, two, torch.float32)


@pytest.mark.parametrize("full, biased", [(True, True), (False, True), (False, False)])
def test_operator_obeys_torch(full, biased):
    samples = packed((6, 3))
    *parts, term = (part.requires_grad_() for part in make(9, 6, term=True))
    parts[3:] = parts[3:] if biased else (None, None)
    _, seed, keys, first_head = dropping(samples)
    given = (term, seed, keys, 0.3, first_head) if full else (None, None, None, 0.0, 0)
    term, seed, keys, rate, first_head = given
    arguments = (*parts, term, samples.begin, samples.length, seed, keys, 6, 1, rate, first_head)
    torch.library.opcheck(attention_forward, arguments)


def test_compilers_see_one_operator():
    samples, parts = packed((6, 3)), [part.requires_grad_() for part in make(9, 6)]
    dropout = dropping(samples)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def function(q, k, v, distances, cls):
        return attention(q, k, v, CompactBias(distances, cls), samples, dropout)

    torch.compile(function, fullgraph=True, backend=backend)(*parts)
    assert len([node for node in graphs[0].graph.nodes if "fused" in str(node.target)]) == 1
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, two in zip(
        *(torch.autograd.grad(f(*parts).square().sum(), parts) for f in (function, compiled)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "function, given, message",
    [
        (packed_samples, ([1, 4], 8), "start with 0"),
        (packed_samples, ([0, 5, 4], 8), "never fall"),
        (packed_samples, ([0, 9], 8), "9 tokens; longest is 8"),
        (packed_samples, ([[0, 9]], 8), r"cu_seqlens is \[1, 2\]"),
        (packed_samples, ([0.0, 9.0], 8), "cu_seqlens is .* torch.float32"),
        (padded_samples, ([3, -1], 8), "no entry may be negative"),
        (padded_samples, ([3, 9], 8), "9 tokens; longest is 8"),
        (padded_samples, (3, 8), r"length is \[\]"),
    ],
)
def test_bad_lengths_are_named(function, given, message):
    numbers, longest = given
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(numbers, device="cpu"), longest)  # on a GPU nobody reads them


META = torch.device("meta")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: {"q": torch.zeros(6, 64)}, r"q is \[6, 64\]"),
        (lambda: {"q": torch.zeros(6, 2, 32, dtype=torch.int64)}, "q is .* torch.int64"),
        (lambda: {"k": torch.zeros(6, 2, 32).half()}, "k is .* torch.float16"),
        (lambda: {"v": torch.zeros(5, 2, 32)}, r"v is \[5, 2, 32\]"),
        (lambda: {"v": torch.zeros(6, 2, 32, device=META)}, "v is .* on meta"),
        (lambda: {"v": torch.zeros(6, 32, 2).transpose(1, 2)}, "v has stride 2"),
        (lambda: {"bias": CompactBias(torch.zeros(2, 3), torch.zeros(1, 2))}, "bias.cls"),
        (
            lambda: {"samples": packed((6,))._replace(longest=40_000)},
            "samples.longest is 40000; it must be in 1..32768",
        ),
        (lambda: {"samples": packed((6,))._replace(longest=0)}, "samples.longest is 0"),
        (lambda: {"samples": packed((6,))._replace(length=torch.ones(2).int())}, r"samples.length is \[2\]"),
        (lambda: {"samples": packed((6,))._replace(length=torch.ones(1).long())}, "samples.length is .* torch.int64"),
        (lambda: {"samples": packed((6,))._replace(begin=torch.zeros(1).int())}, "samples.begin is .* torch.int32"),
        (lambda: {"samples": packed((6,))._replace(stride=-1)}, "samples.stride is -1"),
        (lambda: {"term": torch.zeros(2, 5, 5)}, r"term is \[2, 5, 5\]; it must be \[2, S, S\] with S in 6..32768"),
        (lambda: {"term": torch.zeros(2, 6, 6).int()}, "term is torch.int32"),
        (lambda: {"dropout": dropping(packed((6,)), 1.0)}, "dropout is 1.0"),
        (lambda: {"dropout": dropping(packed((6,)))._replace(seed=torch.tensor(1))}, r"seed is \[\]"),
        (lambda: {"dropout": dropping(packed((6, 1)))}, r"dropout.keys is \[2\]"),
        (lambda: {"dropout": dropping(packed((6,)))._replace(keys=torch.ones(1))}, "dropout.keys is .* torch.float32"),
        (lambda: {"dropout": dropping(packed((6,)))._replace(first_head=-1)}, "dropout.first_head is -1"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, *bias = make(6, 6)
    given = {"q": q, "k": k, "v": v, "bias": CompactBias(*bias), "samples": packed((6,))}
    with pytest.raises(ValueError, match=message):
        attention(**{**given, **change()})


@pytest.mark.parametrize("shape", [(6, 2, 32), (6, 2, 4, 32)])
def test_bad_packed_input_is_named(shape):
    with pytest.raises(ValueError, match="qkv is .* it must be"):
        attention_qkvpacked(torch.zeros(shape), None, packed((6,)))


def test_head_dimensions_of_the_kernels_are_named():
    q, k, v, *bias = make(6, 6, head_dim=20)
    with pytest.raises(ValueError, match=r"q is \[6, 2, 20\]; the kernels have head dimensions \(32, 64, 128\)"):
        attention(q, k, v, CompactBias(*bias), packed((6,)))
