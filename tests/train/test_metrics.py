"""The sums of several ranks and steps in one vector."""

from math import isnan

import torch
import torch.distributed as dist

from metro_megatron.config.schema import Config, ParallelConfig
from metro_megatron.objective.figures import COUNTS
from metro_megatron.objective.terms import exported_terms
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks


def reduced_on_rank() -> tuple[dict[str, float], dict[str, float]]:
    """Four ranks, two of them tensor-parallel: each adds its data-parallel rank + 1 to every sum, twice."""
    layout = Layout.create(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))
    terms = exported_terms(Config())
    metrics = MetricSums(layout, terms)
    sizes = {name: size for sums in (COUNTS, *(term.sums for term in terms)) for name, size in sums.items()}
    own = {name: torch.full((size,), layout.data.rank() + 1.0) for name, size in sizes.items()}
    metrics.add([own, own])
    assert dist.get_world_size() == 4
    return metrics.reduce(), metrics.reduce()


def test_ranks_are_added_tensor_parallel_ones_once_and_then_it_starts_again() -> None:
    for first, second in run_ranks(reduced_on_rank, 4):
        assert first["tokens"] == 2 * (1 + 2)
        assert (first["aux_loss"], first["aux_accuracy"], first["rtd_auc"]) == (1, 1, 0.5)
        assert second["tokens"] == 0 and isnan(second["aux_loss"]), "nothing was measured, which is not 0"


def interrupted_on_rank() -> list[dict[str, float]]:
    """Three steps of which one rank's second is not finite, in one piece and interrupted behind it."""
    layout = Layout.create(ParallelConfig(), torch.device("cpu"))
    terms = exported_terms(Config())
    found = []
    for interrupts in (False, True):
        metrics = MetricSums(layout, terms)
        for step in range(3):
            value = float("nan") if (step, layout.rank) == (1, 1) else step + 1.0
            metrics.add([{name: torch.full((part.stop - part.start,), value) for name, part in metrics.slices.items()}])
            metrics.end_step()
            if step == 1 and interrupts:
                state, metrics = metrics.state(), MetricSums(layout, terms)
                metrics.load_state(state)
        found.append(metrics.reduce())
    return found


def test_an_interruption_changes_no_mean_and_a_step_that_is_not_finite_spoils_none() -> None:
    for whole, interrupted in run_ranks(interrupted_on_rank, 2):
        assert repr(whole) == repr(interrupted), "NaN where equal sums leave nothing to divide by"
        assert whole["tokens"] == 2 * (1 + 3) and whole["aux_loss"] == 1
