"""What is traced for a rank is what a real one does and holds."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from metro_megatron.config.schema import Config
from metro_megatron.health.replicas import diverged
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.exchange import exchange
from metro_megatron.parallel.layout import Layout
from metro_megatron.plan.gpus import GPUS
from metro_megatron.plan.layouts import Cluster
from metro_megatron.rehearsal.documents import Documents
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call, Recorder, calls
from metro_megatron.rehearsal.run import Rehearsal
from metro_megatron.rehearsal.tracing import States, Trace, begin, save, states_of, trace
from metro_megatron.train import step as train_step
from metro_megatron.train import trainer as train_trainer
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.stop import StopRequest
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus

FEW = {"global_batch_size": 8}
SAMPLES = 12
"""Of an evaluation in rehearsals: a batch and half a one."""
SPREAD: dict[str, Any] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
SMALL = small_config(parallel=SPREAD, train=FEW)
TWO_STAGES = small_config(parallel={"pipeline_model_parallel_size": 2}, train=FEW)
TALL = small_config(
    parallel={**SPREAD, "virtual_pipeline_model_parallel_size": 2, "sequence_parallel": True, "recompute": "full"},
    train={**FEW, "precision": "bf16"},
    optimizer={"matrices": "muon", "auxiliary_matrices": "muon"},
)


def real(config: Config) -> tuple[list[list[Call]], dict[str, States], dict[str, list[Call]]]:
    """On every rank: the calls of two steps, what is held after them, and the calls of what is around them."""
    recorder, steps = Recorder(), []
    with recorder, recorder.objects():
        trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
        begin(trainer)
    around = {"start": calls(recorder.taken())}
    data = trainer.corpus.training_data(trainer.layout)
    for batch in data.prefetch(0, 2, 0):
        with recorder:
            trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
        steps.append(calls(recorder.taken()))
    states = states_of(trainer.homes, trainer.optimizer)
    evaluated = list(data.evaluation_batches(SAMPLES, config.train.global_batch_size))
    trainer.corpus = SimpleNamespace(  # type: ignore[assignment]
        evaluation_batches=lambda layout: evaluated,
        samples_before=lambda *place: "",
        fingerprint="",
        index_fingerprint="",
        filled_by="",
    )
    trainer.stop = StopRequest(False, lambda: 0.0)
    for part, does in (("evaluation", trainer.evaluate), ("save", partial(save, trainer))):
        with recorder, recorder.objects():
            does()
        around[part] = calls(recorder.taken())
    trainer.close()
    return steps, states, around


def traced(config: Config, world_size: int) -> list[Trace]:
    """Of every rank, in one process."""
    dist.destroy_process_group()
    ranks, documents = Ranks.of(config.parallel, world_size), Documents.of(small_corpus(config))
    read = [
        (documents.batches(place, ranks.data), documents.evaluation(place, ranks.data)) for place in range(ranks.data)
    ]
    found = [trace(config, world_size, rank, *read[place.data]) for rank, place in enumerate(ranks.places)]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return found


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (TWO_STAGES, 2),
        pytest.param(SMALL, 8, marks=pytest.mark.long),
        pytest.param(TALL, 8, marks=pytest.mark.long),
    ],
    ids=["two stages", "2 x 2 x 2", "2 x 2 x 2, interleaved, recomputed, bf16, Muon"],
)
def test_real_ranks_call_and_hold_what_was_traced(config: Config, world_size: int) -> None:
    """On gloo: operations, groups, sizes and their order in two steps of every rank; bytes of states to 1%."""
    (found,) = run_ranks(traced, 1, config, world_size)
    assert faults_of(config, found) == []
    for rank, (steps, states, around) in enumerate(run_ranks(real, world_size, config)):
        assert [calls(step) for step in found[rank].steps] == steps, rank
        for part, made in around.items():
            assert calls(found[rank].around[part]) == made and made, (rank, part)
        for home, held in states.items():
            assert vars(found[rank].states[home]) == pytest.approx(vars(held), rel=0.01), (rank, home)
        assert all(len(of_step) > 10 for of_step in steps)


def faults_of(config: Config, found: list[Trace]) -> list[str]:
    ranks, cluster = Ranks.of(config.parallel, len(found)), Cluster(GPUS["a100-80g"], len(found), 0.5, 22e9)
    return Rehearsal(config, cluster, ranks, dict(enumerate(found))).faults()


def traced_with_a_fault(config: Config, part: str) -> list[Trace]:
    """The second stage does not take part in the exchange of samples, or in the comparison before a save."""

    def forgetful(own: list[Tensor], counts: list[int], pipeline: ProcessGroup) -> list[Tensor]:
        if pipeline.rank() == 1 and part == ("step" if torch.is_grad_enabled() else "evaluation"):
            return [torch.zeros(count, dtype=torch.int64) for count in counts]
        return exchange(own, counts, pipeline)

    def careless(pair: Pair, layout: Layout) -> list[str]:
        return [] if layout.pipeline.rank() == 1 and part == "save" else diverged(pair, layout)

    with patch.object(train_step, "exchange", forgetful), patch.object(train_trainer, "diverged", careless):
        return traced(config, 2)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            "step",
            "step 1: pipeline group of ranks 0, 1, call 4: rank 0 calls all-gather of 44 int64; "
            "rank 1 calls reduce-scatter of 24,704 float32",
        ),
        pytest.param(
            "evaluation", "evaluation: pipeline group of ranks 0, 1, call 4: rank 0 calls", marks=pytest.mark.long
        ),
        pytest.param("save", "save: pipeline group of ranks 0, 1, call 3: rank 0 calls", marks=pytest.mark.long),
    ],
)
def test_a_fault_of_the_program_is_named(part: str, expected: str) -> None:
    (found,) = run_ranks(traced_with_a_fault, 1, TWO_STAGES, part)
    (fault,) = faults_of(TWO_STAGES, found)
    assert fault.startswith(expected), fault
