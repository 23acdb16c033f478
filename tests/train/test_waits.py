"""Nothing in a step waits for a device: the whole of it is traced on tensors that hold no values.

Both phases, every backward pass, megatron-core's schedule, buffers and reductions, and the update run as they are;
whatever asks a tensor for a value, or for a shape that depends on one, raises. Replaced are the collectives, which
answer at once, and the three checks of fused/ that look at values on the CPU only.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused.samples import Samples
from metro_megatron.config.schema import Config
from metro_megatron.model import sequences
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus, start

EXITS = {"layers": [1], "share": 0.6}


def config_of(**concerns: Any) -> Config:
    """Two layers and few micro batches, since tracing is slow."""
    model = {"num_layers": 2, "auxiliary_num_layers": 1, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    train = {"global_batch_size": 6, **concerns.pop("train", {})}
    return small_config(model=model, train=train, **concerns)


RUNS = {
    "METRO": config_of(),
    "padded, fp16": config_of(data={"row_format": "padded"}, train={"precision": "fp16"}),
    "bf16, all losses, recomputation": config_of(
        train={"precision": "bf16"},
        objective={"main": ["rtd", "clm", "cloze", "scl"], "clm": "mixture"},
        parallel={"recompute": "full"},
    ),
    "early exit by confidence": config_of(early_exit={**EXITS, "rule": "confidence"}),
    "early exit at random": config_of(early_exit={**EXITS, "rule": "random"}),
    "unigram, contrast of padded rows": config_of(
        corruption={"source": "unigram", "disallow_correct": True},
        objective={"main": ["rtd", "scl"]},
        data={"row_format": "padded"},
    ),
    "BERT": config_of(corruption={"source": "none"}, objective={"main": ["mlm"]}),
}


def packed(cu_seqlens: Tensor, longest: int) -> Samples:
    return Samples(cu_seqlens[:-1].long(), cu_seqlens.diff().int(), longest)


def padded(length: Tensor, longest: int) -> Samples:
    return Samples(torch.arange(len(length)), length, longest, len(length))


TENSOR = torch.tensor


def on_host(*args: Any, **kwargs: Any) -> Tensor:
    """torch.tensor, not for a device: it would copy from memory that is not page-locked, which waits."""
    assert "device" not in kwargs
    return TENSOR(*args, **kwargs)


def trace(names: list[str], folder: Path) -> list[str]:
    """Those of RUNS whose step was traced to its end: nothing has a value afterwards. folder is for token counts."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    done = []
    for name in names:
        config = replace(RUNS[name], data=replace(RUNS[name].data, index_cache=str(folder)))
        trainer = start(config)
        metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
        batch = small_corpus(config).training_data(trainer.layout).step_batch(0, 0)
        heads: Any = importlib.import_module("fused.linear_cross_entropy.operator")
        with ExitStack() as stack:
            stack.enter_context(patch.object(heads, "_check"))
            stack.enter_context(patch.object(sequences, "packed_samples", packed))
            stack.enter_context(patch.object(sequences, "padded_samples", padded))
            stack.enter_context(patch.object(torch, "tensor", on_host))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            update = trainer.step.train(batch, metrics)
            with pytest.raises(DataDependentOutputException):
                update.read()  # the one wait of a step
            with pytest.raises(DynamicOutputShapeException):
                update.figures[update.figures > 0]
        assert len(batch.micro_batches) > 1
        done.append(name)
        trainer.close()
    return done


FIRST, *OTHERS = RUNS


@pytest.mark.parametrize("names", [[FIRST], pytest.param(OTHERS, marks=pytest.mark.long)], ids=["METRO", "others"])
def test_a_step_asks_no_tensor_for_a_value(names: list[str], tmp_path: Path) -> None:
    assert run_ranks(trace, 1, names, tmp_path) == [names]
