"""The model of a step's time is the one that is stated, and the best layout is the best of those that can run."""

from dataclasses import replace

import pytest

from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.plan.flops import model_flops
from metro_megatron.plan.gpus import GPUS, peak_tflops
from metro_megatron.plan.layouts import NETWORK_SHARE, Cluster, Estimate, estimate, layouts, reason
from metro_megatron.plan.report import chosen
from metro_megatron.plan.stages import stage_layers

SIZES = ("tensor_model", "pipeline_model")
PATHS = ["--data.train", "x", "--train.output", "x"]


def cluster(gpu: str, gpus: int, efficiency: float = 0.55) -> Cluster:
    return Cluster(GPUS[gpu], gpus, efficiency, NETWORK_SHARE * GPUS[gpu].network)


def configured(preset: str, **parallel: object) -> Config:
    """A preset in another layout; sequence parallelism wherever there is tensor parallelism."""
    config = parse_config(["--config", preset, *PATHS])
    return replace(config, parallel=replace(config.parallel, **parallel))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "gpus", "tp", "compute", "tensor", "data"),
    [
        ("base", 64, 1, 0.089, 0.0, 0.038),
        ("large_pp", 64, 1, 0.258, 0.0, 0.091),
        ("xl", 256, 2, 0.249, 0.031, 0.161),
        ("xxl", 256, 2, 0.853, 0.066, 0.540),
        ("xxl", 512, 4, 0.427, 0.098, 0.270),
    ],
)
def test_seconds_on_a100(preset: str, gpus: int, tp: int, compute: float, tensor: float, data: float) -> None:
    """Figures calculated by hand for a million tokens a step: model FLOPs at 55%, 10 transfers a layer, 4 bytes a
    parameter between nodes if nothing hides."""
    config = configured(
        preset,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        sequence_parallel=tp > 1,
        overlap=False,
        grad_reduce_in_fp32=False,
    )
    found = estimate(config, cluster("a100-80g", gpus))
    assert found.real.tokens == 1 << 20
    assert model_flops(config, found.real) / (gpus * 312e12 * 0.55) == pytest.approx(compute, rel=0.01)
    again = 1.07 if preset == "base" else 1.03  # logits are multiplied once more
    assert compute < 1.01 * (found.seconds.corruption + found.seconds.main) < 1.01 * again * compute
    assert found.seconds.tensor == pytest.approx(tensor, rel=0.02)
    assert found.seconds.data == pytest.approx(data, rel=0.02)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_bubble_of_a_pipeline(pp: int, vpp: int) -> None:
    """Its busy time is M micro batches on the slowest stage; a stage waits (pp - 1) / vpp of them."""
    config = configured("base", pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    found = estimate(config, cluster("h100", 8))
    micro_batches = (1 << 20) // (16384 * 8 // pp)
    heads_only = configured("base", pipeline_model_parallel_size=1)
    heads_share = 1 - _layers_share(heads_only)
    *layers, last = (layers / 12 * (1 - heads_share) for layers in stage_layers(config))
    stage = found.seconds.main / micro_batches * pp * max([*layers, last + heads_share])
    assert found.seconds.main + found.seconds.bubble == pytest.approx((micro_batches + (pp - 1) / vpp) * stage)
    assert found.fits


def _layers_share(config: Config) -> float:
    """Of main's work, by hand: 24 H^2 + 4 L H a layer in 3 passes, 0.15 x 2 H V in 4, and RTD."""
    hidden, vocabulary = 768, 128_000
    layers = 12 * (24 * hidden**2 + 4 * 512 * hidden) * 3
    table = 2 * (2 * 510 + 1 + 2) * 65 * 12 * 3 / 16384  # once for all layers
    heads = 0.15 * 2 * hidden * vocabulary * 4 + 3 * 2 * hidden
    return (layers + table) / (layers + table + heads)


@pytest.fixture(scope="module")
def found() -> list[Estimate]:
    return layouts(configured("xxl"), cluster("a100-80g", 64))


def test_layouts_are_those_that_the_checks_admit(found: list[Estimate]) -> None:
    assert all(problems(one.config, 64, "cuda") == [] for one in found)
    sizes = {(one.config.parallel.model_ranks, one.config.parallel.recompute) for one in found}
    assert {(1, "none"), (8, "full"), (64, "none")} <= sizes
    assert [one.seconds.total for one in found] == sorted(one.seconds.total for one in found)


def test_the_best_layout_and_why_others_lose(found: list[Estimate]) -> None:
    best, *others = chosen(found, runners_up=100)
    assert best.fits and best.seconds.total == min(one.seconds.total for one in found if one.fits)
    for one in others:
        if one.fits:
            name = reason(one, best)
            assert name.startswith("+") and one.seconds.total >= best.seconds.total
        else:
            assert one.seconds.total < best.seconds.total and reason(one, best).startswith("needs ")
    sizes = {(*(one.options[f"parallel.{name}_parallel_size"] for name in SIZES), one.fits) for one in others}
    assert len(sizes) == len(others)
    assert chosen([one for one in found if not one.fits]) == []


def test_a_faster_network_needs_less_tensor_parallelism() -> None:
    """XXL on 256 A100: with one adapter a GPU gradients travel long; with what eight in a ring give they do not."""
    slow = cluster("a100-80g", 256)
    fast = replace(slow, network=8 * slow.network)
    one, other = (chosen(layouts(configured("xxl"), network))[0] for network in (slow, fast))
    assert one.config.parallel.model_ranks > 1 == other.config.parallel.model_ranks
    assert one.seconds.total > other.seconds.total


def test_padding_costs_time_and_no_model_flops() -> None:
    padded = replace(configured("base"), data=replace(configured("base").data, row_format="padded"))
    whole = estimate(padded, cluster("h100", 8))
    part = estimate(padded, replace(cluster("h100", 8), fill=0.75))
    # Matrices are as large, and only attention notices that samples are shorter.
    assert 0.75 < part.tokens_per_second / whole.tokens_per_second < 0.79 and part.mfu < 0.79 * whole.mfu
    packed = estimate(configured("base"), replace(cluster("h100", 8), fill=0.75))
    assert packed.tokens_per_second > whole.tokens_per_second  # shorter samples have fewer scores


def test_peak_of_a_device() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989
    assert peak_tflops("NVIDIA H200", "fp32") == 67 and peak_tflops("NVIDIA H100 PCIe", "bf16") is None
