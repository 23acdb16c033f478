"""The kernels, in the interpreter, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fused.ahead_of_time import ARCHITECTURES
from fused.dispatch import reference_only
from fused.dropout import drop_threshold, keep_mask
from fused.layer_norm import RowDropout, layer_norm, layer_norm_ref
from fused.layer_norm import operator as module
from fused.layer_norm.operator import layer_norm_forward
from tests.fused.draws import Draws, arriving
from tests.fused.tolerances import assert_close

EPS = 1e-5
NAMES = ("x", "weight", "bias", "residual", "x_bias")


def make(rows, hidden, names=NAMES, dtype=torch.float32):
    draws = Draws(rows * hidden + len(names))
    parts = {}
    for name in names:
        shape = (rows, hidden) if name in ("x", "residual") else (hidden,)
        parts[name] = draws.normal(*shape).to(dtype)
    return parts


def seed():
    return torch.tensor([2**50 + 3])


def keys_of(rows):
    """Names that differ in both halves, of either sign."""
    return torch.arange(rows) * (2**33 + 1) - 5


def run(function, parts, rate=0.0, is_last=False):
    """The output and the gradients of all parts, in double; the arriving gradient is exact in every type."""
    dropout = RowDropout(rate, seed(), keys_of(len(parts["x"])), is_last)
    parts = {name: part.detach().clone().requires_grad_() for name, part in parts.items()}
    x, weight, bias = (parts[name] for name in NAMES[:3])
    others = {name: parts.get(name) for name in NAMES[3:]}
    y = function(x, weight, bias, EPS, **others, dropout=dropout if rate else None)
    gradients = torch.autograd.grad((y.double() * arriving(y.shape)).sum(), list(parts.values()))
    return {"y": y.detach(), **dict(zip(parts, gradients, strict=True))}


def agree(parts, rate=0.0, is_last=False):
    dtype = parts["x"].dtype
    wanted = run(layer_norm_ref, {name: part.double() for name, part in parts.items()}, rate, is_last)
    got = run(layer_norm, parts, rate, is_last)
    for name, part in got.items():
        assert part.dtype == parts.get(name, parts["x"]).dtype
        assert_close(part, wanted[name], dtype)
    return got


@pytest.mark.parametrize("names", [NAMES, NAMES[:3], NAMES[:4], ("x", "weight", "bias", "x_bias")])
@pytest.mark.parametrize("rate, is_last", [(0.0, False), (0.3, False), (0.3, True)])
def test_any_part_may_be_absent(names, rate, is_last):
    agree(make(6, 200, names), rate, is_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    agree(make(5, 768, dtype=dtype), 0.1)


def test_parameters_may_be_more_precise_than_the_rows():
    parts = make(5, 96)
    rows = {name: parts[name].bfloat16() for name in ("x", "residual")}
    agree({**parts, **rows}, 0.1)


WIDE = [pytest.param(*shape, marks=pytest.mark.long) for shape in ((2, 1024), (2, 1536), (2, 2560), (1, 8193))]


@pytest.mark.parametrize("rows, hidden", [(1, 64), (3, 1000), (7, 1), *WIDE])
def test_awkward_shapes(rows, hidden):
    agree(make(rows, hidden), 0.1)


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 9), st.integers(1, 300), st.sampled_from([0.0, 0.5]))
def test_random_shapes(rows, hidden, dropout):
    agree(make(rows, hidden), dropout)


def test_extreme_values():
    """All equal, near the largest half, and far from 0 with little spread: mean and deviation are FP32."""
    for row in (torch.full((128,), 3.0), torch.linspace(-65504, 65504, 128), 2048 + torch.arange(128) % 3 * 2):
        parts = make(1, 128, NAMES[:3], torch.float16)
        agree({**parts, "x": row[None].half()})


def test_the_mask_of_forward_is_that_of_backward_and_of_philox():
    parts = make(40, 70, NAMES[:3])
    keys = keys_of(40)
    wanted = keep_mask(seed(), drop_threshold(0.3), 70, keys, keys >> 32)
    inputs = [part + 9 for part in parts.values()]
    kept = layer_norm_forward(*inputs, EPS, None, None, 0.3, seed(), keys, False)[1] != 0
    assert torch.equal(kept, wanted)
    assert torch.equal(kept, run(layer_norm, parts, 0.3)["x"] != 0)
    assert torch.equal(kept, run(layer_norm, parts, 0.3, is_last=True)["y"] != 0)
    assert abs(float(kept.double().mean()) - 0.7) < 4 * (0.21 / 2800) ** 0.5


def test_dropout_depends_on_the_keys_of_rows_not_on_their_positions():
    x, weight, bias = make(5, 64, NAMES[:3]).values()
    order = torch.tensor([3, 0, 4, 1, 2])
    keys = keys_of(5)
    for function in (layer_norm, layer_norm_ref):
        one = function(x, weight, bias, EPS, dropout=RowDropout(0.5, seed(), keys))
        other = function(x[order], weight, bias, EPS, dropout=RowDropout(0.5, seed(), keys[order]))
        assert torch.equal(one[order], other)


def test_dropout_last_is_dropout_of_the_result():
    parts = make(6, 40)
    plain, dropped = run(layer_norm_ref, parts)["y"], run(layer_norm_ref, parts, 0.5, is_last=True)["y"]
    kept = dropped != 0
    assert 60 < kept.sum() < 180
    torch.testing.assert_close(dropped, plain * kept * 2)


def test_layout_on_the_gpu_changes_nothing(monkeypatch):
    """Gradients of rows are equal bit for bit; sums over rows only change their order."""
    parts = make(9, 200)
    before = agree(parts, 0.3)
    assert all(torch.equal(part, before[name]) for name, part in run(layer_norm, parts, 0.3).items())
    monkeypatch.setattr(module, "processors", lambda device: 1)
    monkeypatch.setattr(module, "WARPS_PER_PROCESSOR", dict.fromkeys(ARCHITECTURES, 1))
    monkeypatch.setattr(module, "BACKWARD_ELEMENTS", dict.fromkeys(ARCHITECTURES, 64))
    monkeypatch.setattr(module, "COLUMN_TILE", (16, 32))
    after = agree(parts, 0.3)
    assert all(torch.equal(before[name], after[name]) for name in ("y", "x", "residual"))


def test_strided_inputs():
    parts = make(12, 64)
    wanted = run(layer_norm, parts)
    wide = {name: torch.stack((part, part), -1)[..., 0] for name, part in parts.items()}
    assert not wide["x"].is_contiguous()
    assert all(torch.equal(part, wanted[name]) for name, part in run(layer_norm, wide).items())


def test_reference_is_torchs_layer_norm():
    parts = make(4, 33)
    z = parts["residual"] + (parts["x"] + parts["x_bias"])
    wanted = functional.layer_norm(z, (33,), parts["weight"], parts["bias"], EPS)
    with reference_only():
        assert torch.equal(run(layer_norm, parts)["y"], wanted)


@pytest.mark.parametrize("names, rate", [(NAMES, 0.1), (NAMES[:3], 0.0)])
def test_operator_obeys_torch(names, rate):
    mask = (rate, seed(), keys_of(3), False) if rate else (0.0, None, None, False)
    parts = {name: part.requires_grad_() for name, part in make(3, 64, names).items()}
    x, weight, bias = (parts[name] for name in NAMES[:3])
    arguments = (x, weight, bias, EPS, parts.get("residual"), parts.get("x_bias"), *mask)
    torch.library.opcheck(layer_norm_forward, arguments)


def test_compilers_see_one_operator():
    graphs = []
    compiled = torch.compile(layer_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x, weight, bias = make(3, 64, NAMES[:3]).values()
    torch.testing.assert_close(compiled(x, weight, bias, EPS), layer_norm(x, weight, bias, EPS))
    ours = [node for node in graphs[0].graph.nodes if "fused" in str(node.target)]
    assert len(ours) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: {"weight": torch.ones(63)}, r"weight is \[63\] torch.float32"),
        (lambda: {"bias": torch.ones(64, dtype=torch.int64)}, "bias is .* torch.int64"),
        (lambda: {"x_bias": torch.ones(1, 64)}, r"x_bias is \[1, 64\]"),
        (lambda: {"residual": torch.ones(2, 64)}, r"residual is \[2, 64\]"),
        (lambda: {"residual": torch.ones(3, 64).half()}, "residual is .* torch.float16"),
        (lambda: {"weight": torch.ones(64, device="meta")}, "weight is .* on meta; "),
        (lambda: {"x": torch.ones(3, 64, dtype=torch.int32)}, "x is .* torch.int32"),
        (lambda: {"x": torch.tensor(1.0)}, r"x is \[\]"),
        (lambda: {"x": torch.ones(3, 0)}, r"x is \[3, 0\]"),
        (lambda: {"dropout": RowDropout(1.0, seed(), keys_of(3))}, "dropout is 1.0"),
        (lambda: {"dropout": RowDropout(0.1, torch.tensor([1, 2]), keys_of(3))}, r"seed is \[2\]"),
        (lambda: {"dropout": RowDropout(0.1, seed(), keys_of(2))}, r"dropout.keys is \[2\] .*must be \[3\]"),
        (lambda: {"dropout": RowDropout(0.1, seed(), keys_of(3).int())}, "dropout.keys is .* torch.int32"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**{**make(3, 64), "eps": EPS, **change()})


def test_too_wide_rows_are_named():
    x, weight, bias = make(1, 16385, NAMES[:3]).values()
    with pytest.raises(ValueError, match=r"x is \[1, 16385\]; the kernels take rows of at most 16384"):
        layer_norm(x, weight, bias, EPS)
