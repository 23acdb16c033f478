"""What is traced for a rank is what a real one does and holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from metro_megatron.config.schema import Config
from metro_megatron.rehearsal.documents import Documents
from metro_megatron.rehearsal.matching import mismatches
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call, Recorder, calls
from metro_megatron.rehearsal.tracing import States, Trace, states_of, trace
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus, start

FEW = {"global_batch_size": 8}
SPREAD: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
SMALL = small_config(parallel=SPREAD, train=FEW)
TALL = small_config(
    parallel={**SPREAD, "virtual_pipeline_model_parallel_size": 2, "sequence_parallel": True, "recompute": "full"},
    train={**FEW, "precision": "bf16"},
    optimizer={"matrices": "muon", "auxiliary_matrices": "muon"},
)


def real(config: Config) -> tuple[list[list[Call]], dict[str, States]]:
    """On every rank: the calls of two steps, and what is held after them."""
    trainer, recorder, steps = start(config), Recorder(), []
    for batch in trainer.corpus.training_data(trainer.layout).prefetch(0, 2, 0):
        with recorder:
            trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
        steps.append(calls(recorder.taken()))
    states = states_of(trainer.homes, trainer.optimizer)
    trainer.close()
    return steps, states


def traced(config: Config, world_size: int) -> list[Trace]:
    """Of every rank, in one process."""
    dist.destroy_process_group()
    ranks, documents = Ranks.of(config.parallel, world_size), Documents.of(small_corpus(config))
    batches = [documents.batches(place, ranks.data) for place in range(ranks.data)]
    found = [trace(config, world_size, rank, batches[place.data]) for rank, place in enumerate(ranks.places)]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return found


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (small_config(parallel={"pipeline_model_parallel_size": 2}, train=FEW), 2),
        pytest.param(SMALL, 8, marks=pytest.mark.long),
        pytest.param(TALL, 8, marks=pytest.mark.long),
    ],
    ids=["two stages", "2 x 2 x 2", "2 x 2 x 2, interleaved, recomputed, bf16, Muon"],
)
def test_real_ranks_call_and_hold_what_was_traced(config: Config, world_size: int) -> None:
    """On gloo: operations, groups, sizes and their order in two steps of every rank; bytes of states to 1%."""
    (found,) = run_ranks(traced, 1, config, world_size)
    for rank, (steps, states) in enumerate(run_ranks(real, world_size, config)):
        assert [calls(step) for step in found[rank].steps] == steps, rank
        for home, held in states.items():
            assert vars(found[rank].states[home]) == pytest.approx(vars(held), rel=0.01), (rank, home)
    own = {rank: calls(one.steps[1]) for rank, one in enumerate(found)}
    assert len(own[0]) > 10 and mismatches(own, Ranks.of(config.parallel, world_size)) == []
