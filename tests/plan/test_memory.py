"""Bytes are those of METRO's Table 4, and within 1% those that ranks allocate."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused.dispatch import interpreted
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.plan.memory import encoder_bytes, layer_bytes, rank_memory, run_memory, state_bytes, zero_memory
from metro_megatron.plan.parameters import trained
from tests.distributed import run_ranks
from tests.parity.small_run import run_steps, small_config, start

ALONE = ["--config", "xxl", "--parallel.tensor_model_parallel_size=1", "--parallel.sequence_parallel=false"]


def test_table_4() -> None:
    """GB of XXL on 256 GPUs; the paper rounds 0.375 to "400MB", 0.047 to "50MB", 0.469 to "500MB"."""
    parameters = trained(parse_config(ALONE))
    found = [zero_memory(parameters, stage, 256) for stage in range(4)]
    rows = [(one.weights / 1e9, one.gradients / 1e9, one.optimizer / 1e9) for one in found]
    assert rows == [
        pytest.approx(row, rel=2e-3)
        for row in [(12.0, 12.0, 96.0), (12.0, 12.0, 0.375), (12.0, 0.0469, 0.375), (0.0469, 0.0469, 0.375)]
    ]
    assert [one.total / 1e9 for one in found] == pytest.approx([120.0, 24.4, 12.43, 0.469], rel=2e-3)


@pytest.mark.parametrize(("option", "expected"), [("true", 36.3), ("false", 24.4)])
def test_xxl_on_256_gpus_by_format_of_gradients(option: str, expected: float) -> None:
    config = parse_config([*ALONE, f"--parallel.grad_reduce_in_fp32={option}"])
    assert run_memory(config, 256).states / 1e9 == pytest.approx(expected, rel=2e-3)


def test_one_device() -> None:
    """18 bytes a parameter in bf16, 16 in FP32; Muon's matrices, 4 H^2 + 2 H F of a layer, take 4 less."""
    config = small_config(train={"precision": "bf16"}, parallel={"tensor_model_parallel_size": 2})
    assert state_bytes(config) == 18 * trained(config)
    assert state_bytes(small_config()) == 16 * trained(config)
    muon = replace(config, optimizer=replace(config.optimizer, matrices="muon"))
    assert state_bytes(config) - state_bytes(muon) == 4 * 4 * (4 * 64**2 + 2 * 64 * 128)
    assert state_bytes(config) == pytest.approx(run_memory(small_config(train={"precision": "bf16"}), 1).states)


LAYOUTS: tuple[dict[str, dict[str, Any]], ...] = (
    {
        "parallel": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_layout": "Ettt|tL",
        },
        "train": {"precision": "bf16"},
        "optimizer": {"matrices": "muon", "auxiliary_matrices": "muon"},
    },
    {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "grad_reduce_in_fp32": False,
        },
        "train": {"precision": "bf16"},
    },
)


def allocated(configs: list[Config]) -> list[tuple[int, int, int, int]]:
    """On every rank after a step: (pipeline stage, bytes of weights, of gradient buffers, of masters and moments)."""
    found = []
    for config in configs:
        trainer = start(config)
        run_steps(trainer, 0, 1)
        buffers = [buffer for ddp in trainer.homes.all for buffer in ddp.buffers]
        weights, gradients = (sum(x.nbytes for x in tensors) for tensors in zip(*map(_tensors, buffers), strict=True))
        state = 0
        for optimizer in (trainer.optimizer.shared.optimizer, trainer.optimizer.stage.optimizer):
            for parameter, moments in optimizer.state.items():
                state += sum(moment.nbytes for moment in moments.values() if moment.dim())  # all but the step
                # FP32 weights are views of the buffer, counted there.
                state += parameter.nbytes if config.train.precision != "fp32" else 0
        found.append((trainer.layout.pipeline.rank(), weights, gradients, state))
        trainer.close()
    return found


def _tensors(buffer: Any) -> tuple[Any, Any]:
    return buffer.param_data, buffer.grad_data


def test_what_ranks_allocate() -> None:
    """bf16 on 4 ranks, dp 1 and dp 2, and FP32 alone."""
    configs = [small_config(**changes) for changes in LAYOUTS]
    ranks = [(4, pair) for rank in run_ranks(allocated, 4, configs) for pair in zip(configs, rank, strict=True)]
    alone = small_config()
    for gpus, (config, (stage, weights, gradients, state)) in [*ranks, (1, (alone, allocated([alone])[0]))]:
        planned = rank_memory(config, gpus, stage)
        assert (weights, gradients) == pytest.approx((planned.weights, planned.gradients), rel=0.01)
        copies = 0.0 if config.parallel.grad_reduce_in_fp32 else 4 / 16  # made while gradients are applied
        assert state == pytest.approx((1 - copies) * planned.optimizer, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter where there is no GPU")
@pytest.mark.parametrize(
    ("norm_first", "modules"),
    [
        (False, []),
        (False, ["core_attn", "mlp_act"]),
        pytest.param(True, [], marks=pytest.mark.long),
        pytest.param(False, ["mlp"], marks=pytest.mark.long),
        pytest.param(True, ["layernorm", "mlp"], marks=pytest.mark.long),
        pytest.param(True, ["core_attn", "layernorm", "mlp_act"], marks=pytest.mark.long),
    ],
)
def test_what_forward_leaves_for_backward(norm_first: bool, modules: list[str]) -> None:
    """To the byte, with the kernels: what autograd saves of embedding and a layer that has a row for every slot."""
    model = {"num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 192}  # no matrix has as many rows as slots
    model |= {"norm_first": norm_first, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    parallel = {"recompute": "selective", "recompute_modules": modules} if modules else {}
    config = small_config(model=model, train={"precision": "bf16"}, parallel=parallel)
    trainer, saved = start(config), {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.int64 and x.size(0) == micro_batch.tokens.numel():
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()  # views of one are kept once
        return x

    try:
        (batch, main) = trainer.corpus.training_data(trainer.layout).step_batch(0, 0), trainer.pair.main[0]
        micro_batch = replace(batch.micro_batches[0], dropout_seed=torch.zeros(1, dtype=torch.int64))
        with interpreted(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            main.train().encode(micro_batch.tokens, micro_batch)
    finally:
        trainer.close()
    config = replace(config, data=replace(config.data, micro_batch_tokens=micro_batch.tokens.numel()))
    assert sum(storage.nbytes() for storage in saved.values()) == encoder_bytes(config, config.model.main, 1)


def test_what_a_layer_keeps() -> None:
    """32 T H bytes in bf16, 16 T H shared out over 2 ranks with their positions; recomputation keeps 2 T H."""
    config = parse_config(["--config", "base"])
    slots, hidden = config.data.micro_batch_slots, config.model.hidden_size
    statistics = slots * (4 * config.model.num_attention_heads + 16)
    assert layer_bytes(config, config.model.main) == 32 * slots * hidden + statistics
    parallel = replace(config.parallel, tensor_model_parallel_size=2, sequence_parallel=True)
    half = replace(config, parallel=parallel)
    assert layer_bytes(half, config.model.main) == 16 * slots * hidden + statistics / 2
    full = replace(config, parallel=replace(config.parallel, recompute="full"))
    saved = run_memory(config, 8).activations - run_memory(full, 8).activations
    layers = config.model.num_layers
    assert saved == layers * (30 * slots * hidden + statistics) - layer_bytes(config, config.model.main)
