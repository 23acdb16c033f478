"""Weight gradients of micro batches are added up in FP32, however layers are split, recomputed and reduced."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from fused.weight_gradient import add_weight_gradient
from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.model import linear
from metro_megatron.model.init import global_parameters
from metro_megatron.train.metrics import MetricSums
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
PARTS: dict[str, Any] = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
SP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
Gradients = dict[str, Tensor]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_sum_over_many_products_is_that_of_fp32(device: str) -> None:
    """256 of them; in bf16 each would be rounded by up to 2^-9."""
    generator = torch.Generator().manual_seed(0)
    total, exact, rounded = (
        torch.zeros(24, 16, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)
    )
    total = total.to(device)
    for _ in range(256):
        inputs, gradient = (torch.randn(32, size, generator=generator).bfloat16() for size in (16, 24))
        add_weight_gradient(inputs.to(device), gradient.to(device), total)
        exact += gradient.double().t() @ inputs.double()
        rounded += gradient.t() @ inputs
    scale = exact.abs().max().item()
    assert (total.cpu() - exact).abs().max().item() < 1e-6 * scale < 1e-4 * scale < (rounded - exact).abs().max().item()


def small(**parallel: Any) -> Config:
    """One layer each, or one a stage; nine micro batches a step on one rank."""
    stages = parallel.get("pipeline_model_parallel_size", 1)
    return small_config(
        model={"num_layers": stages, "auxiliary_num_layers": 1, "hidden_dropout": 0.1, "auxiliary_dropout": "train"},
        data={"micro_batch_tokens": 64},
        train={"precision": "bf16", "global_batch_size": 12},
        parallel=parallel,
    )


def gradients(configs: list[Config]) -> list[tuple[Gradients, Gradients]]:
    """On every rank, of each configuration: sums after a step, and those of the products in FP64, added up beside."""
    return [_gradients(config) for config in configs]


def _gradients(config: Config) -> tuple[Gradients, Gradients]:
    exact: dict[int, Tensor] = {}

    def add(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        product = gradient.double().t() @ inputs.double()
        exact[total.data_ptr()] = exact.get(total.data_ptr(), 0) + product
        add_weight_gradient(inputs, gradient, total)

    linear.add_weight_gradient = add
    trainer = start(config)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 = add
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    assert len(batch.micro_batches) > 5 or trainer.layout.data.size() > 1
    trainer.optimizer.step = lambda step, *others: None  # type: ignore[method-assign,assignment]
    trainer.step.train(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    found = {
        name: parameter.main_grad
        for prefix, module in trainer.pair.modules()
        for name, parameter in global_parameters(module, prefix)
        if name.endswith(MATRICES)
    }
    sums = {name: exact[total.data_ptr()] for name, total in found.items() if total.data_ptr() in exact}
    trainer.close()
    return {name: total.clone() for name, total in found.items()}, sums


def assert_once(own: Gradients, exact: Gradients) -> None:
    """Each product was added, once, without another rounding than FP32's."""
    for name, total in exact.items():
        assert (own[name] - total).abs().max() < 1e-6 * total.abs().max(), name


def assert_equal(own: Gradients, other: Gradients) -> None:
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


def test_sums_are_those_of_fp32_products() -> None:
    """Recomputed, reduced behind the products or not; and all are within bf16 of what autograd adds up."""
    (own, exact), (other, _) = run_ranks(gradients, 1, [small(), small(**PARTS, overlap=False)])[0]
    assert len(exact) == len(own) == 4 * 2
    assert_once(own, exact)
    assert_equal(own, other)
    ((by_autograd, nothing),) = run_ranks(without_accumulation, 1, [small()])[0]
    assert nothing == {}
    for name, total in own.items():
        error = ((by_autograd[name] - total).norm() / total.norm()).item()
        assert 1e-4 < error < 1e-2, name


def without_accumulation(configs: list[Config]) -> list[tuple[Gradients, Gradients]]:
    mcore._accumulates = lambda *given: False
    return gradients(configs)


@pytest.mark.long
@pytest.mark.parametrize("parallel", [SP, {"pipeline_model_parallel_size": 2}])
def test_ranks_add_up_their_parts(parallel: dict[str, Any]) -> None:
    """megatron-core's own layers, where ranks divide matrices, and stages; the auxiliary is summed up over these."""
    recomputations: list[dict[str, Any]] = [{}, PARTS, {"recompute": "full"}]
    for runs in run_ranks(gradients, 2, [small(**parallel, **one) for one in recomputations]):
        is_own = parallel is SP
        (own, exact), *others = runs
        assert_once(own, {name: total for name, total in exact.items() if is_own or name.startswith("main")})
        for other, _ in others:
            assert_equal(own, other)


@pytest.mark.long
def test_data_parallel_ranks_reduce_beside_the_products_as_behind_them() -> None:
    for (beside, _), (behind, _) in run_ranks(gradients, 2, [small(), small(overlap=False)]):
        assert_equal(beside, behind)
