"""The sums of several ranks and steps in one vector."""

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
        assert second["tokens"] == 0 and second["aux_loss"] == 0
