"""The vocabulary head's kernels, under the interpreter, against plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional

from fused.dispatch import jit, reference_only, tl
from fused.linear_cross_entropy import (
    Sampling,
    VocabularyShard,
    combine,
    gumbel_noise,
    linear_cross_entropy,
    shard_loss,
    shard_statistics,
)
from fused.linear_cross_entropy import operator as head
from fused.linear_cross_entropy.kernels import _gumbel, _uniform
from fused.linear_cross_entropy.reference import shard_logits_ref
from tests.fused.draws import Draws

# Logits are rounded to the dtype of rows, as torch's own linear layer rounds them; they reach about 8 here.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SPECIALS = 5
GPU_TILES = (head.CHUNK, head.PIECE, head.GRADIENT_TILE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, 48, 32, (32, 4))


def set_tiles(monkeypatch, chunk, piece, gradient_tile):
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "PIECE", piece)
    monkeypatch.setattr(head, "GRADIENT_TILE", gradient_tile)


def make(count, hidden, size, vocab_size, dtype=torch.float32, seed=0):
    """[rows, weight, bias], targets and noise keys; values that the dtype holds."""
    draws = Draws(seed)
    parts = [draws.normal(count, hidden), draws.normal(size, hidden) * 2 / hidden**0.5, draws.normal(size)]
    targets = draws.integers(0, vocab_size, count)
    keys = draws.integers(-(2**31), 2**31, count, 2).int()
    return [part.to(dtype) for part in parts], targets, keys


def run(parts, targets, shard, keys, **how):
    """Statistics of one shard, and the gradients of a weighted sum of losses; how: of `Sampling`."""
    sampling = None if keys is None else Sampling(keys, **how)
    parts = [part.detach().clone().requires_grad_() for part in parts]
    bias = parts[2] if len(parts) == 3 else None
    statistics = linear_cross_entropy(parts[0], parts[1], bias, targets, shard, sampling)
    weights = torch.linspace(-1, 1, targets.numel(), dtype=torch.float64)
    return statistics, torch.autograd.grad((statistics.loss.double() * weights).sum(), parts)


def agree(parts, targets, shard, keys, tolerance, **how):
    """Kernels against the reference in float64; ids by how far their score is from the best one."""
    got, gradients = run(parts, targets, shard, keys, **how)
    exact = [part.double() for part in parts]
    wanted, wanted_gradients = run(exact, targets, shard, keys, **how)
    for one, other in zip([*got[:3], *gradients], [*wanted[:3], *wanted_gradients], strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=tolerance)
    logits = shard_logits_ref(exact[0], exact[1], exact[2] if len(exact) == 3 else None, shard)
    assert near_best(logits, got.predicted, 4 * tolerance)
    if keys is None:
        assert got.sampled is None
        return
    ids = torch.arange(shard.first, shard.first + logits.size(1)).int()
    scores = logits + how.get("temperature", 1.0) * gumbel_noise(keys, ids)
    scores[:, : shard.num_specials] = -1e30
    scores[:, list(shard.scattered)] = -1e30
    if how.get("disallow_correct"):
        scores.scatter_(1, targets[:, None], -1e30)
        assert not bool((got.sampled == targets).any())
    assert near_best(scores, got.sampled, 4 * tolerance)


def near_best(scores, ids, tolerance):
    return bool((scores.amax(1) - scores.gather(1, ids[:, None])[:, 0] <= tolerance).all())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias, with_noise", [(True, True), (False, False)])
def test_values_and_gradients_equal_the_reference(dtype, with_bias, with_noise):
    parts, targets, keys = make(13, 40, 120, 110, dtype)
    parts = parts if with_bias else parts[:2]
    agree(parts, targets, VocabularyShard(0, 110, SPECIALS), keys if with_noise else None, TOLERANCE[dtype])


def test_special_ids_among_the_others_are_never_drawn():
    """As in BERT's vocabulary; where they would be drawn most often, in the first chunk and in others."""
    parts, targets, keys = make(13, 40, 120, 110, seed=4)
    scattered = tuple(sorted(set(functional.linear(*parts)[:, :110].argmax(1).tolist()) - {0}))
    shard = VocabularyShard(0, 110, 1, scattered)
    agree(parts, targets, shard, keys, 1e-5)
    assert not set(run(parts, targets, shard, keys)[0].sampled.tolist()) & {0, *scattered}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "how", [{"temperature": 1.368}, {"disallow_correct": True}, {"temperature": 0.5, "disallow_correct": True}]
)
def test_tempered_samples_and_samples_of_other_ids_equal_the_reference(dtype, how):
    parts, targets, keys = make(13, 40, 120, 110, dtype, seed=2)
    targets = functional.linear(*parts)[:, :110].argmax(1)  # what would be drawn most often
    agree(parts, targets, VocabularyShard(0, 110, SPECIALS), keys, TOLERANCE[dtype], **how)


@pytest.mark.long
@settings(deadline=None, max_examples=8)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(2, 100), st.integers(0, 40), st.integers(0, 10**6))
def test_any_shape_equals_the_reference(count, hidden, vocab_size, padding, seed):
    parts, targets, keys = make(count, hidden, vocab_size + padding, vocab_size, seed=seed)
    agree(parts, targets, VocabularyShard(0, vocab_size, min(SPECIALS, vocab_size - 1)), keys, 1e-5)


def test_tiles_of_the_gpu_equal_the_reference(monkeypatch):
    set_tiles(monkeypatch, *GPU_TILES)
    parts, targets, keys = make(3, 16, 12200, 12100, seed=9)
    agree(parts, targets, VocabularyShard(0, 12100, SPECIALS), keys, 3e-6)


def test_reference_is_what_torch_says():
    parts, targets, keys = make(9, 16, 64, 60, torch.float64)
    statistics, gradients = run(parts, targets, VocabularyShard(0, 60, SPECIALS), keys)
    leaves = [part.requires_grad_() for part in parts]
    logits = functional.linear(*leaves)[:, :60]
    loss = functional.cross_entropy(logits, targets, reduction="none")
    exact = torch.autograd.grad((loss * torch.linspace(-1, 1, 9)).sum(), leaves)
    torch.testing.assert_close([statistics.loss, *gradients], [loss, *exact], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(statistics.predicted, logits.argmax(1))


@jit
def noise_kernel(Keys, Ids, Out, COUNT: tl.constexpr):
    ids = tl.load(Ids + tl.arange(0, COUNT))
    tl.store(Out + tl.arange(0, COUNT), _gumbel(_uniform(tl.load(Keys), tl.load(Keys + 1), ids)))


@pytest.mark.parametrize("keys", [(1, 2), (-3, 2**31 - 1), (-(2**31), 0)])
def test_noise_of_kernel_and_reference_is_one(keys):
    keys, ids = torch.tensor([keys], dtype=torch.int32), torch.arange(2**14, dtype=torch.int32) * 8
    noise = torch.empty(ids.numel())
    noise_kernel[(1,)](keys, ids, noise, ids.numel())
    # Two implementations of the logarithm.
    torch.testing.assert_close(noise[None], gumbel_noise(keys, ids), atol=1e-6, rtol=1e-6)


def test_noise_is_standard_gumbel_with_its_upper_tail():
    keys = Draws(0).integers(-(2**31), 2**31, 400, 2).int()
    noise = gumbel_noise(keys, torch.arange(5000, dtype=torch.int32)).cpu().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise[:, ::50].ravel(), "gumbel_r").pvalue > 1e-3
    maxima = noise.max(axis=1) - np.log(5000)  # the maximum of n is Gumbel shifted by log n
    assert stats.kstest(maxima, "gumbel_r").pvalue > 1e-3
    rows = np.corrcoef(noise[:40])
    assert np.abs(rows - np.eye(40)).max() < 0.08


def test_noise_is_golden():
    noise = gumbel_noise(torch.tensor([[1, 2], [-3, 2**31 - 1]], dtype=torch.int32), torch.tensor([0, 7, 127999]))
    expected = torch.tensor([[-0.454177, 1.463489, 0.026575], [3.498928, -0.428101, 0.066627]])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype, slack",
    [
        (torch.float32, 2e-4),
        pytest.param(torch.bfloat16, 2e-4, marks=pytest.mark.long),
        pytest.param(torch.float32, 2.0, marks=pytest.mark.long),
    ],
)
def test_samples_and_argmax_are_those_of_whole_logits(monkeypatch, dtype, slack):
    """A slack above 1 makes every piece compute all of its noise in full."""
    monkeypatch.setattr(head, "SLACK", slack)
    parts, targets, keys = make(60, 32, 120, 110, dtype, seed=3)
    statistics = linear_cross_entropy(*parts, targets, VocabularyShard(0, 110, SPECIALS), Sampling(keys))
    # Chunk by chunk, since a GPU may round a wider product otherwise.
    chunks = [logits.to(torch.float32, copy=True) for _, logits in head._chunks(*parts)]
    logits = torch.cat(chunks, 1)[:, :110]
    scores = logits + gumbel_noise(keys, torch.arange(110, dtype=torch.int32))
    scores[:, :SPECIALS] = -torch.inf
    assert torch.equal(statistics.sampled, scores.argmax(1))
    assert torch.equal(statistics.predicted, logits.argmax(1))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "shards, chunk, piece",
    [(2, 48, 64), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((3, 40, 16), (6, 7, 128)))],
)
def test_shards_and_chunks_change_nothing(monkeypatch, shards, chunk, piece, reference):
    parts, targets, keys = make(11, 24, 120, 99, seed=5)  # the last of six shards is padding alone
    whole, gradients = run(
        parts, targets, VocabularyShard(0, 99, SPECIALS), keys, temperature=1.4, disallow_correct=True
    )
    set_tiles(monkeypatch, chunk, piece, (16, 2))
    size = 120 // shards
    leaves = [part.requires_grad_() for part in parts]
    pieces = [
        (leaves[0], leaves[1][begin : begin + size], leaves[2][begin : begin + size], targets,
         VocabularyShard(begin, 99, SPECIALS)) for begin in range(0, 120, size)
    ]  # fmt: skip
    with reference_only() if reference else torch.enable_grad():
        joined = combine(torch.stack([shard_statistics(*one, Sampling(keys, 1.4, True)) for one in pieces]))
        # Every rank adds its part of the gradient to the same loss.
        loss = sum(shard_loss(*one, joined) for one in pieces)
    assert torch.equal(joined.sampled, whole.sampled) and torch.equal(joined.predicted, whole.predicted)
    torch.testing.assert_close(joined[:3], tuple(x.detach() for x in whole[:3]), atol=2e-6, rtol=2e-6)
    split = torch.autograd.grad((loss.double() * torch.linspace(-1, 1, 11, dtype=torch.float64)).sum(), leaves)
    torch.testing.assert_close(split, gradients, atol=3e-6, rtol=3e-6)


def test_frequencies_are_softmax_without_specials():
    wanted = torch.tensor([9.0, 9, 9, 1, 2, 3, 4, 10])
    _, targets, keys = make(20000, 1, 8, 8)
    rows, weight = torch.zeros(20000, 1), torch.zeros(8, 1)
    with reference_only():  # the kernels' samples equal it, in the test above
        statistics = linear_cross_entropy(rows, weight, wanted.log(), targets, VocabularyShard(0, 8, 3), Sampling(keys))
    counts = statistics.sampled.bincount(minlength=8)
    assert counts[:3].sum() == 0
    expected = 20000 * wanted[3:] / 20
    assert ((counts[3:] - expected) ** 2 / expected).sum() < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("disallow_correct", [False, True])
def test_a_million_draws_are_softmax_at_their_temperature(disallow_correct):
    count, temperature = 10**6, 1.368
    logits = Draws(3).normal(24) * 2
    shard, (_, _, keys) = VocabularyShard(0, 24, 3), make(count, 1, 24, 24, seed=4)
    targets = torch.full((count,), int(logits.argmax()))
    with reference_only():
        sampling = Sampling(keys, temperature, disallow_correct)
        partial = shard_statistics(torch.zeros(count, 1), torch.zeros(24, 1), logits, targets, shard, sampling)
    counts = combine(partial[None]).sampled.bincount(minlength=24)
    wanted = (logits.double() / temperature).exp()
    wanted[:3] = 0
    if disallow_correct:
        wanted[targets[0]] = 0
    expected = count * wanted / wanted.sum()
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0].cpu(), expected[expected > 0].cpu()).pvalue > 0.001


def test_extreme_logits():
    shard = VocabularyShard(0, 50, SPECIALS)
    rows = torch.tensor([[0.0], [60000.0], [-60000.0]], dtype=torch.float16)
    weight = torch.zeros(64, 1, dtype=torch.float16)
    weight[9], weight[50:] = 1.0, 1.0  # ids from 50 on are padding and must not matter
    targets, keys = torch.tensor([7, 9, 9]), torch.zeros(3, 2, dtype=torch.int32)
    statistics, gradients = run([rows, weight], targets, shard, keys)
    assert statistics.predicted.tolist() == [0, 9, 0]  # the smallest of equal ids
    assert statistics.sampled[1] == 9 and statistics.sampled[2] != 9
    log = torch.tensor([50.0, 49.0]).log()
    torch.testing.assert_close(statistics.loss.detach(), torch.stack([log[0], log[0] * 0, log[1] + 60000]))
    torch.testing.assert_close(statistics.entropy, torch.stack([log[0], log[0] * 0, log[1]]), atol=1e-5, rtol=0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][50:] == 0).all()


def test_no_rows_give_empty_statistics_and_gradients_of_zero():
    parts, targets, keys = make(0, 8, 100, 90)
    statistics, gradients = run(parts, targets, VocabularyShard(0, 90), keys)
    assert statistics.loss.shape == statistics.sampled.shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients)


def test_logits_exist_one_chunk_at_a_time():
    (rows, weight, bias), _, _ = make(3, 8, 100, 100)
    chunks = [(ids, logits.data_ptr(), logits.clone()) for ids, logits in head._chunks(rows, weight, bias)]
    assert [ids.stop - ids.start for ids, _, _ in chunks] == [48, 48, 4]
    assert len({address for _, address, _ in chunks}) == 1
    together = torch.cat([logits for _, _, logits in chunks], 1)
    torch.testing.assert_close(together, functional.linear(rows, weight, bias))


def test_repeated_runs_are_equal():
    parts, targets, keys = make(7, 16, 120, 110)
    first, second = (run(parts, targets, VocabularyShard(0, 110, SPECIALS), keys) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True))


def test_operators_obey_torch():
    parts, targets, keys = make(3, 8, 60, 50)
    leaves = [part.requires_grad_() for part in parts]
    lse, loss = torch.full((3,), 9.0), torch.ones(3)
    torch.library.opcheck(head.vocabulary_loss, (*leaves, targets, lse, loss, 0, 50))
    fixed = [part.detach() for part in parts]
    torch.library.opcheck(head.vocabulary_statistics, (*fixed, targets, keys, 0, 50, SPECIALS, [7, 40], 2.0, True))
    torch.library.opcheck(head.vocabulary_gradients, (loss, *fixed, targets, lse, 0, 50))


def test_compiled_graph_has_one_node_for_each_step():
    parts, targets, keys = make(3, 8, 60, 50)
    shard, graphs = VocabularyShard(0, 50, SPECIALS), []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "vocabulary" in str(node.target)])
        return graph

    compiled, sampling = torch.compile(linear_cross_entropy, backend=backend, fullgraph=True), Sampling(keys)
    torch.testing.assert_close(
        compiled(*parts, targets, shard, sampling), linear_cross_entropy(*parts, targets, shard, sampling)
    )
    assert len(graphs) == 1 and len(graphs[0]) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: {"rows": torch.zeros(3, 7)}, r"rows is \[3, 7\] and weight \[60, 8\]"),
        (lambda: {"weight": torch.zeros(60, 8).half()}, "weight is .*torch.float16"),
        (lambda: {"bias": torch.zeros(59)}, r"bias is \[59\].*must be \[60\]"),
        (lambda: {"targets": torch.zeros(3, dtype=torch.int32)}, "targets is .*torch.int32"),
        (lambda: {"sampling": Sampling(torch.zeros(3, 2))}, "sampling.keys is .*torch.float32"),
        (
            lambda: {"sampling": Sampling(torch.zeros(3, 2, dtype=torch.int32, device="meta"))},
            "sampling.keys is .*on meta",
        ),
        (lambda: {"sampling": Sampling(torch.zeros(3, 2, dtype=torch.int32), 0.0)}, "sampling.temperature is 0.0"),
        (lambda: {"shard": VocabularyShard(-1, 50)}, "shard.first is -1"),
        (lambda: {"shard": VocabularyShard(0, 50, 50)}, "shard.num_specials 50"),
        (lambda: {"shard": VocabularyShard(0, 2**24 + 1)}, "shard.vocab_size is 16777217"),
    ],
)
def test_bad_input_is_named(change, message):
    (rows, weight, bias), targets, keys = make(3, 8, 60, 50)
    given = {"rows": rows, "weight": weight, "bias": bias, "targets": targets, "sampling": Sampling(keys)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | {"shard": VocabularyShard(0, 50)} | change()))


@pytest.mark.parametrize("ids, message", [((0, 50, 1), r"0\.\.50; they must be in 0\.\.49"), ((0, -1, 1), r"-1\.\.1")])
def test_ids_outside_the_vocabulary_are_named_on_the_cpu(ids, message):
    """On a GPU nobody reads them."""
    with torch.device("cpu"), pytest.raises(ValueError, match="targets has ids " + message):
        rows, weight = torch.zeros(3, 8), torch.zeros(60, 8)
        linear_cross_entropy(rows, weight, None, torch.tensor(ids), VocabularyShard(0, 50))


def test_statistics_of_other_rows_are_refused():
    parts, targets, keys = make(3, 8, 60, 50)
    statistics = linear_cross_entropy(*parts, targets, VocabularyShard(0, 50), Sampling(keys))
    with pytest.raises(ValueError, match=r"statistics.lse is \[2\]"):
        shard_loss(*parts, targets, VocabularyShard(0, 50), statistics._replace(lse=statistics.lse[:2]))
