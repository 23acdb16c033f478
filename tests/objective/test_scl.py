"""Contrast over ranks that hold different numbers of samples, against the masked matrix of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.schema import ParallelConfig
from metro_megatron.objective.scl import contrast
from metro_megatron.parallel.layout import Layout
from tests.distributed import run_ranks

SAMPLES = (3, 0, 2, 4)
HIDDEN, TEMPERATURE = 5, 0.2


def states_of(rank: int) -> Tensor:
    return torch.randn(2 * SAMPLES[rank], HIDDEN, generator=torch.Generator().manual_seed(rank)).double()


def on_rank() -> list[tuple[float, int, Tensor]]:
    """Loss, hits and gradient, against the states of all ranks and against this rank's alone."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    found = []
    for group, samples in ((layout.data, SAMPLES), (layout.solo, SAMPLES[layout.rank : layout.rank + 1])):
        states = states_of(layout.rank).requires_grad_()
        loss, correct = contrast(states, list(samples), TEMPERATURE, group)
        loss.backward()
        assert states.grad is not None
        found.append((loss.item(), int(correct), states.grad))
    return found


def by_matrix(ranks: list[int]) -> tuple[float, int, list[Tensor]]:
    """The same for these ranks together: views of one sample are the i-th rows of both halves of a rank's states."""
    parts = [states_of(rank).requires_grad_() for rank in ranks]
    states = functional.normalize(torch.cat(parts), dim=-1)
    partners, begin = [], 0
    for rank in ranks:
        half = begin + torch.arange(SAMPLES[rank])
        partners += [*(half + SAMPLES[rank]).tolist(), *half.tolist()]
        begin += 2 * SAMPLES[rank]
    is_self = torch.eye(len(states), dtype=torch.bool)
    matrix = (states @ states.t() / TEMPERATURE).masked_fill(is_self, -torch.inf)
    loss = functional.cross_entropy(matrix, torch.tensor(partners), reduction="sum")
    hits = int((matrix.argmax(-1) == torch.tensor(partners)).sum())
    return loss.item(), hits, list(torch.autograd.grad(loss, parts))


def test_contrast_is_cross_entropy_of_the_masked_matrix() -> None:
    ranks = list(range(len(SAMPLES)))
    found = run_ranks(on_rank, len(SAMPLES))
    loss, hits, gradients = by_matrix(ranks)
    assert sum(everyone[0] for everyone, _ in found) == pytest.approx(loss, rel=1e-12)
    assert sum(everyone[1] for everyone, _ in found) == hits
    for (_, _, gradient), expected in zip((everyone for everyone, _ in found), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
    for rank in ranks:
        alone = found[rank][1]
        if SAMPLES[rank]:
            loss, hits, (expected,) = by_matrix([rank])
            assert alone[:2] == (pytest.approx(loss, rel=1e-12), hits)
            torch.testing.assert_close(alone[2], expected)
        else:
            assert alone[:2] == (0.0, 0)
