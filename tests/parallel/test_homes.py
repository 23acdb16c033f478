"""Which ranks add up whose gradients, when, and that every rank has the new parameters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.model.encoder import TIED
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start


@dataclass
class Found:
    shared: dict[str, set[float]]
    """Values of this rank's part of the summed gradients, by module."""
    stage: set[float]
    quiet: bool
    """Whether nothing was added up while gradients were collected."""
    fetched: bool
    """Whether a changed master weight arrived in every part of the parameters."""


def own_part(ddp: torch.nn.Module, ranks: int, rank: int) -> torch.Tensor:
    """What a reduce-scatter over so many ranks leaves on this one, of all buckets."""
    buckets = [bucket for buffer in ddp.buffers for bucket in buffer.buckets]
    return torch.cat([bucket.grad_data.chunk(ranks)[rank] for bucket in buckets])


def collected(config: Config) -> Found:
    """On every rank: all gradients are rank + 1, as if both phases had left them, then the step's communication."""
    trainer = start(config)
    homes, layout = trainer.homes, trainer.layout
    homes.begin_step()
    with homes.quiet():
        for ddp in homes.all:
            for buffer in ddp.buffers:
                buffer.grad_data.fill_(layout.rank + 1.0)
        before = [own_part(ddp, layout.replica.size(), layout.replica.rank()).unique() for ddp in homes.shared.values()]
    homes.end_corruption_phase()
    homes.end_main_phase()
    replica = layout.replica
    found = Found(
        {name: set(own_part(ddp, replica.size(), replica.rank()).tolist()) for name, ddp in homes.shared.items()},
        {value for ddp in homes.stage for value in own_part(ddp, layout.data.size(), layout.data.rank()).tolist()},
        all(values.tolist() == [layout.rank + 1.0] for values in before),
        False,
    )
    for ddp in homes.all:  # whole parameters, of which a rank only updates its part
        for buffer in ddp.buffers:
            size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            for bucket in buffer.buckets:
                bucket.param_data.fill_(-1.0)
                bucket.param_data.chunk(size)[rank].fill_(7.0)
        ddp.start_param_sync(force_sync=True) if not homes.overlap else None
    homes.fetch_parameters()
    found.fetched = all(bool((p == 7).all()) for ddp in homes.all for p in ddp.parameters())
    trainer.close()
    return found


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("pp", [1, 2])
def test_shared_gradients_are_summed_over_the_pipeline_too(overlap: bool, pp: int) -> None:
    config = small_config(parallel={"pipeline_model_parallel_size": pp, "overlap": overlap})
    for rank, found in enumerate(run_ranks(collected, 2, config)):
        assert set(found.shared) == {TIED, "aux"}
        assert found.shared == {TIED: {3.0}, "aux": {3.0}}, "1 + 2, whether the two ranks share data or a pipeline"
        assert found.stage == ({3.0} if pp == 1 else {rank + 1.0}), "a stage's own only over data-parallel ranks"
        assert found.quiet and found.fetched
