"""Which ranks add up whose gradients, when, and that every rank has the new parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.model.encoder import TIED
from tests.distributed import run_ranks
from tests.parity.small_run import run_steps, small_config, start


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


def note_flights(group: Any, name: str, events: list[str]) -> None:
    """Have a bucket group's collectives say when they start and when somebody waits until they are through."""

    def noting(kind: str, handle: str, method: str) -> None:
        plain = getattr(group, method)

        def call(*given: Any, **named: Any) -> None:
            was_flying = getattr(group, handle) is not None
            plain(*given, **named)
            is_flying = getattr(group, handle) is not None
            if was_flying != is_flying:
                events.append(f"{kind} {name} {'starts' if is_flying else 'ends'}")

        setattr(group, method, call)

    for method in ("start_param_sync", "finish_param_sync"):
        noting("gather", "param_gather_handle", method)
    for method in ("start_grad_sync", "finish_grad_sync"):
        noting("reduce", "grad_reduce_handle", method)


def note_phase(step: Any, phase: str, work: str, events: list[str]) -> None:
    plain = getattr(step, work)

    def call(*given: Any) -> Any:
        events.append(f"{phase} begins")
        result = plain(*given)
        events.append(f"{phase} ends")
        return result

    setattr(step, work, call)


def flights(config: Config) -> list[str]:
    """On every rank: what happens in the second step, in order: phases, and collectives of homes."""
    trainer = start(config)
    run_steps(trainer, 0, 1)
    events: list[str] = []
    for name, ddp in (*trainer.homes.shared.items(), *(("stage", one) for one in trainer.homes.stage)):
        for group in ddp.bucket_groups:
            note_flights(group, name, events)
    note_phase(trainer.step, "phase 1", "propose", events)
    note_phase(trainer.step, "phase 2", "read", events)
    run_steps(trainer, 1, 2)
    trainer.close()
    return events


@pytest.mark.parametrize("parallel", [{}, pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.long)])
def test_collectives_are_in_flight_while_others_work(parallel: dict[str, Any]) -> None:
    """Stage's gather behind phase 1; the auxiliary's reduction behind phase 2, at whose end stage's has started."""
    for events in run_ranks(flights, 4 if parallel else 2, small_config(parallel=parallel)):
        at = {event: number for number, event in enumerate(events)}
        assert len(at) == len(events) == 4 + 2 * 2 * 3, events
        for before, after in pairwise(
            ["gather stage starts", "phase 1 begins", "phase 1 ends", "gather stage ends", "phase 2 begins"]
        ):
            assert at[before] < at[after], (before, after, events)
        for before, after in pairwise(
            ["phase 1 ends", "reduce aux starts", "phase 2 begins", "phase 2 ends", "reduce aux ends"]
        ):
            assert at[before] < at[after], (before, after, events)
        assert at["phase 2 begins"] < at["reduce stage starts"] < at["phase 2 ends"] < at["reduce stage ends"]
        assert at["phase 2 ends"] < at["reduce tied starts"], "both phases add to it"
        assert max(at["gather tied ends"], at["gather aux ends"]) < at["phase 1 begins"], "which reads them"


@pytest.mark.long
def test_without_overlap_nothing_is_in_flight() -> None:
    for events in run_ranks(flights, 2, small_config(parallel={"overlap": False})):
        assert events == ["phase 1 begins", "phase 1 ends", "phase 2 begins", "phase 2 ends"]
