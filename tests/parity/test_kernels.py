"""Training with Triton kernels, in the interpreter, and with torch references: the same losses, step by step."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fused.dispatch import interpreted
from metro_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, Norms, run_steps, small_config, start

STEPS = 2


def run(config: Config, with_kernels: bool) -> tuple[list[Figures], list[Norms]]:
    trainer = start(config)
    with interpreted() if with_kernels else nullcontext():
        return run_steps(trainer, 0, STEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter where there is no GPU")
@pytest.mark.parametrize("row_format", ["packed", pytest.param("padded", marks=pytest.mark.long)])
def test_kernels_and_references_agree_step_by_step(row_format: str) -> None:
    """Dropout too: both draw the same masks."""
    config = small_config(
        model={"num_attention_heads": 2, "num_layers": 1, "auxiliary_num_layers": 1}
        | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        data={"row_format": row_format, "seq_length": 16, "micro_batch_tokens": 32, "micro_batch_size": 2},
        train={"global_batch_size": 2},
    )
    (got, got_norms), (wanted, wanted_norms) = (run_ranks(run, 1, config, kernels)[0] for kernels in (True, False))
    for one, other in zip(got, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(got_norms, wanted_norms, rtol=2e-5)
