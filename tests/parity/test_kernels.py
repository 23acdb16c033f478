"""Training with Triton kernels, in the interpreter or on a GPU, and with torch references: the same, step by step."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from fused.dispatch import interpreted
from metro_megatron.config.schema import Config
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, Norms, run_steps, small_config, start

STEPS = 2


def run(config: Config, with_kernels: bool, steps: int = STEPS) -> tuple[list[Figures], list[Norms]]:
    trainer = start(config)
    with interpreted() if with_kernels else nullcontext():
        return run_steps(trainer, 0, steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter where there is no GPU")
@pytest.mark.parametrize("row_format", ["packed", pytest.param("padded", marks=pytest.mark.long)])
def test_kernels_and_references_agree_step_by_step(row_format: str) -> None:
    """Dropout too: both draw the same masks."""
    config = kernel_config(row_format)
    agree(*(run_ranks(run, 1, config, kernels)[0] for kernels in (True, False)), rel=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("row_format", ["packed", "padded"])
def test_a_gpu_trains_as_the_cpu_does(row_format: str) -> None:
    """Kernels there, references here."""
    config = kernel_config(row_format)
    (wanted,) = run_ranks(run, 1, config, False, 3)
    (got,) = run_ranks(run, 1, on_gpu(config), False, 3, backend="nccl")
    agree(got, wanted, rel=1e-4)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    run_ranks(train_without_waiting, 1, on_gpu(kernel_config("packed")), backend="nccl")


def kernel_config(row_format: str) -> Config:
    """Heads of 32, the least that kernels take."""
    return small_config(
        model={"num_attention_heads": 2, "num_layers": 1, "auxiliary_num_layers": 1}
        | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        data={"row_format": row_format, "seq_length": 16, "micro_batch_tokens": 32, "micro_batch_size": 2},
        train={"global_batch_size": 2},
    )


def on_gpu(config: Config) -> Config:
    return replace(config, train=replace(config.train, device="cuda"))


def agree(got: tuple[list[Figures], list[Norms]], wanted: tuple[list[Figures], list[Norms]], rel: float) -> None:
    for one, other in zip(got[0], wanted[0], strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6)
    np.testing.assert_allclose(got[1], wanted[1], rtol=rel)


def train_without_waiting(config: Config) -> None:
    """A step in which torch raises where a call waits for the device, behind two that compile and take memory."""
    trainer = start(config)
    run_steps(trainer, 0, 2)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(2, trainer.progress.seen_samples)
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    torch.cuda.set_sync_debug_mode("error")
    trainer.step.train(batch, metrics)
    torch.cuda.set_sync_debug_mode("default")
