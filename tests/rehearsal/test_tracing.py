"""What is traced for a rank is what a real one does and holds."""

from __future__ import annotations

from typing import Any

import pytest

from metro_megatron.config.schema import Config
from metro_megatron.rehearsal.recording import Call, Recorder, calls
from metro_megatron.rehearsal.tracing import States, Trace, trace
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus, start
from tests.rehearsal.traces import traces

LAYOUTS = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2, "recompute": "full",
     "virtual_pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 4, "overlap": False},
]  # fmt: skip


def real(configs: list[Config]) -> list[tuple[list[list[Call]], dict[str, States]]]:
    """On every rank: the calls of two steps, and the bytes of both homes."""
    found = []
    for config in configs:
        trainer, recorder, steps = start(config), Recorder(), []
        for batch in trainer.corpus.training_data(trainer.layout).prefetch(0, 2, 0):
            with recorder:
                trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
            steps.append(calls(recorder.taken()))
        found.append((steps, states(trainer)))
        trainer.close()
    return found


@pytest.mark.long
def test_eight_ranks_call_and_hold_what_was_traced() -> None:
    configs = [small_config(parallel=one, train={"precision": "bf16"}) for one in LAYOUTS]
    for rank, found in enumerate(run_ranks(real, 8, configs)):
        for config, (steps, held) in zip(configs, found, strict=True):
            pass
