"""The fused operators as benchmarks run them: inputs on any device, the call, what it must do at least.

Legend: T tokens, H hidden, N heads, K head dimension, n samples, L longest sample, M masked rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import Work, attention_work, layer_norm_work, linear_cross_entropy_work, softmax_dropout_work
from fused.ahead_of_time import HEAD_DIM, HEADS, HIDDEN_SIZES, ROW_TOKENS, SAMPLE_TOKENS, VOCABULARY
from fused.attention import CompactBias, Dropout, attention, packed_samples
from fused.layer_norm import RowDropout, layer_norm
from fused.linear_cross_entropy import Sampling, VocabularyShard, linear_cross_entropy
from fused.softmax_dropout import softmax_dropout

EPSILON = 1e-5
NUM_SPECIALS = 5
DROPOUT = 0.1
MASKED = int(0.15 * ROW_TOKENS)
SIZES = dict(zip(("base", "large", "xl", "xxl"), zip(HIDDEN_SIZES, HEADS, strict=True), strict=True))
"""Hidden size and heads, by preset."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An operator at one size."""

    operator: str
    preset: str
    hidden: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    """Of the samples of a row."""
    masked: int
    vocab: int

    @property
    def is_uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def size(self) -> str:
        """What the operator's time depends on, for tables."""
        lengths = f"{len(self.lengths)} x {self.lengths[0]}" if self.is_uniform else f"{len(self.lengths)} mixed"
        return {
            "layer_norm": f"{sum(self.lengths)} x {self.hidden}",
            "softmax_dropout": f"{self.heads} heads, {lengths}",
            "attention": f"{self.heads} heads of {self.head_dim}, {lengths}",
            "linear_cross_entropy": f"{self.masked} x {self.hidden} x {self.vocab}",
        }[self.operator]

    def small(self) -> "Case":
        """The same widths with few rows, some of them at the edges of tiles; few ids, but more than one chunk."""
        is_trial = sum(self.lengths) < 1000
        lengths, masked, vocab = ((20, 7, 1), 16, 257) if is_trial else ((512, 130, 1, 77), 130, 9000)
        return replace(self, lengths=lengths, masked=masked, vocab=vocab)


class Operator(NamedTuple):
    """How an operator is run."""

    inputs: Callable[[Case, torch.device], dict[str, Tensor]]
    """Random, in bfloat16 where the model has it; the same for equal cases."""
    leaves: Sequence[str]
    """Inputs that get gradients."""
    call: Callable[[Tensors, float], tuple[Tensor, ...]]
    """From inputs and dropout rate: what gradients flow through, then ids."""
    work: Callable[[Case], Work]


def cases(is_trial: bool = False) -> list[Case]:
    """All operators at the sizes of all presets, and attention with other heads and samples; or one small size of each.

    The presets come in the order of their weight in a report: base, the largest, the others.
    """
    if is_trial:
        trial = [Case(name, "trial", 64, 2, 32, (24, 24), 16, 300) for name in MEASURED]
        return [*trial, replace(trial[2], preset="trial mixed", lengths=(24, 3, 20))]
    rows = (SAMPLE_TOKENS,) * (ROW_TOKENS // SAMPLE_TOKENS)
    found = []
    for preset in ("base", "xxl", "large", "xl"):
        hidden, heads = SIZES[preset]
        found += [Case(name, preset, hidden, heads, HEAD_DIM, rows, MASKED, VOCABULARY) for name in MEASURED]
    base = next(case for case in found if case.operator == "attention")
    found += [replace(base, preset=f"base, heads of {head_dim}", head_dim=head_dim) for head_dim in (32, 128)]
    return [*found, replace(base, preset="base, mixed", lengths=mixed_lengths())]


def mixed_lengths(tokens: int = ROW_TOKENS, longest: int = SAMPLE_TOKENS) -> tuple[int, ...]:
    """Lognormal lengths of documents cut at `longest`, which fill a row of `tokens`."""
    generator, lengths = np.random.default_rng(0), list[int]()
    while (room := tokens - sum(lengths)) > 0:
        lengths.append(int(min(room, longest, 1 + generator.lognormal(np.log(280), 1.28))))
    return tuple(lengths)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def _layer_norm_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x and residual [T, H], vectors [H]."""
    generator, tokens, hidden = _generator(device), sum(case.lengths), case.hidden
    return {
        "x": _normal(generator, tokens, hidden),
        "residual": _normal(generator, tokens, hidden),
        "weight": _normal(generator, hidden),
        "bias": _normal(generator, hidden),
        "x_bias": _normal(generator, hidden),
        "seed": torch.tensor([7], device=device),
        "row_keys": torch.arange(tokens, device=device) * 1_000_003,
    }


def _layer_norm(t: Tensors, dropout: float) -> tuple[Tensor, ...]:
    drop = RowDropout(dropout, t["seed"], t["row_keys"])
    x, weight, bias = t["x"], t["weight"], t["bias"]
    return (layer_norm(x, weight, bias, EPSILON, residual=t["residual"], x_bias=t["x_bias"], dropout=drop),)


def _bias_inputs(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Compact bias: distances [N, 2 L - 3] and cls [N, 2]."""
    width = 2 * max(case.lengths) - 3
    parts = {"distances": width, "cls": 2}
    return {name: _normal(generator, case.heads, size, dtype=torch.float32) for name, size in parts.items()}


def _sample_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    lengths = torch.tensor(case.lengths, device=device)
    place = torch.arange(max(case.lengths), device=device)
    return {
        "is_key": place < lengths[:, None],
        "keys": torch.arange(len(case.lengths), device=device) * 1_000_003,
        "seed": torch.tensor([7], device=device),
    }


def _softmax_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """scores [n, N, L, L]."""
    generator, longest = _generator(device), max(case.lengths)
    scores = _normal(generator, len(case.lengths), case.heads, longest, longest)
    return {"scores": scores, **_bias_inputs(case, generator), **_sample_inputs(case, device)}


def _softmax(t: Tensors, dropout: float) -> tuple[Tensor, ...]:
    bias = CompactBias(t["distances"], t["cls"])
    return (softmax_dropout(t["scores"], bias, t["is_key"], 1.0, Dropout(dropout, t["seed"], t["keys"])),)


def _attention_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """q, k, v [T, N, K]; cu_seqlens [n + 1]."""
    generator = _generator(device)
    shape = (sum(case.lengths), case.heads, case.head_dim)
    return {
        **{name: _normal(generator, *shape) for name in ("q", "k", "v")},
        **_bias_inputs(case, generator),
        **_sample_inputs(case, device),
        "cu_seqlens": torch.tensor([0, *np.cumsum(case.lengths).tolist()], dtype=torch.int32, device=device),
    }


def _attention(t: Tensors, dropout: float) -> tuple[Tensor, ...]:
    bias, samples = CompactBias(t["distances"], t["cls"]), packed_samples(t["cu_seqlens"], t["is_key"].size(1))
    drop = Dropout(dropout, t["seed"], t["keys"])
    return (attention(t["q"], t["k"], t["v"], bias, samples, drop),)


def _head_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """rows [M, H], weight [V, H] such that logits have deviation 1, bias [V], targets [M], noise_keys [M, 2]."""
    generator = _generator(device)
    integers: dict[str, Any] = {"generator": generator, "device": device}
    return {
        "rows": _normal(generator, case.masked, case.hidden),
        "weight": _normal(generator, case.vocab, case.hidden) * case.hidden**-0.5,
        "bias": _normal(generator, case.vocab) * 0.1,
        "targets": torch.randint(NUM_SPECIALS, case.vocab, (case.masked,), **integers),
        "noise_keys": torch.randint(2**31, (case.masked, 2), dtype=torch.int32, **integers),
    }


def _head(t: Tensors, dropout: float) -> tuple[Tensor, ...]:
    """There is no dropout in a vocabulary head."""
    shard = VocabularyShard(0, t["weight"].size(0), NUM_SPECIALS)
    found = linear_cross_entropy(t["rows"], t["weight"], t["bias"], t["targets"], shard, Sampling(t["noise_keys"]))
    assert found.sampled is not None
    return found.loss, found.predicted, found.sampled


MEASURED = {
    "layer_norm": Operator(
        _layer_norm_inputs,
        ("x", "residual", "weight", "bias", "x_bias"),
        _layer_norm,
        lambda case: layer_norm_work(sum(case.lengths), case.hidden),
    ),
    "softmax_dropout": Operator(
        _softmax_inputs,
        ("scores", "distances", "cls"),
        _softmax,
        lambda case: softmax_dropout_work(len(case.lengths), case.heads, max(case.lengths)),
    ),
    "attention": Operator(
        _attention_inputs,
        ("q", "k", "v", "distances", "cls"),
        _attention,
        lambda case: attention_work(case.heads, case.head_dim, case.lengths),
    ),
    "linear_cross_entropy": Operator(
        _head_inputs,
        ("rows", "weight", "bias"),
        _head,
        lambda case: linear_cross_entropy_work(case.masked, case.hidden, case.vocab),
    ),
}


def errors(case: Case, device: torch.device, dropout: float = DROPOUT) -> dict[str, float]:
    """How far value and gradients of a small case are from float64, whose tensors always take the reference.

    |got - wanted| / |wanted| by name of output or input; for ids the share that differs.
    """
    operator = MEASURED[case.operator]
    inputs = operator.inputs(case.small(), device)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    got, wanted = (_values(operator, one, dropout) for one in (inputs, wide))
    found = {name: _distance(got[name], wanted[name]) for name in got}
    if (name := "gradient of cls") in got:
        found[name] = _distance(got[name][:, 1], wanted[name][:, 1])
        # One number for a whole row of scores, whose gradients add up to 0: what remains is rounding.
        found[f"{name}'s row"] = (got[name][:, 0].norm() / wanted["gradient of distances"].norm()).item()
    return found


def _values(operator: Operator, inputs: Tensors, dropout: float) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in operator.leaves}
    value, *ids = operator.call({**inputs, **leaves}, dropout)
    arriving = torch.randn(value.shape, generator=_generator(value.device), device=value.device)
    gradients = torch.autograd.grad((value.double() * arriving).sum(), list(leaves.values()))
    named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"value": value.detach(), **{f"ids {n}": x for n, x in enumerate(ids)}, **named}


def _distance(got: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return (got != wanted).double().mean().item()
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm()).item()


TOLERANCE = {"value": 0.02, "gradient": 0.05, "ids": 0.15}
"""Largest admitted error by the first word of its name. bfloat16 rounds to 2^-9; backward reads rounded values, and
the bias sums up their errors; logits that differ in the last bit change some of the most probable ids. A wrong kernel
is off by about 1."""


def wrong(found: Mapping[str, float]) -> list[str]:
    """The errors that are too large, or not numbers."""
    return [f"{name} {error:.2g}" for name, error in found.items() if not error <= TOLERANCE[name.split()[0]]]
