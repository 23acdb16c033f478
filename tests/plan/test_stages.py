"""Layers of stages: no other division makes the slowest stage faster."""

from dataclasses import replace
from itertools import product

import pytest

from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.plan.stages import chunk_layers, heads_in_layers, stage_layers
from tests.parity.small_run import small_config

PATHS = ["--data.train", "x", "--train.output", "x"]


def staged(config: Config, pp: int, vpp: int = 1, layout: str = "") -> Config:
    sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp}
    return replace(config, parallel=replace(config.parallel, pipeline_model_parallel_layout=layout, **sizes))  # type: ignore[arg-type]


def test_what_heads_weigh() -> None:
    """By hand at base: 0.15 x 2 H V in 4 passes and 2 H in 3, by a layer's 24 H^2 + 4 L H in 3."""
    hidden, vocabulary = 768, 128_000
    heads = 0.15 * 2 * hidden * vocabulary * 4 + 3 * 2 * hidden
    layer = 3 * (24 * hidden**2 + 4 * 512 * hidden)
    assert heads_in_layers(parse_config(["--config", "base", *PATHS])) == pytest.approx(heads / layer)


@pytest.mark.parametrize(
    ("preset", "pp", "vpp", "chunks"),
    [
        ("base", 1, 1, [12]),
        ("base", 2, 1, [7, 5]),
        ("base", 4, 1, [3, 4, 4, 1]),
        ("base", 2, 2, [4, 4, 3, 1]),
        ("large_pp", 8, 1, [3, 3, 3, 3, 3, 3, 4, 2]),
        ("xxl", 4, 1, [16, 16, 16, 16]),
    ],
)
def test_layers_of_the_paper_s_models(preset: str, pp: int, vpp: int, chunks: list[int]) -> None:
    config = staged(parse_config(["--config", preset, *PATHS]), pp, vpp)
    assert chunk_layers(config) == chunks
    assert stage_layers(config) == [sum(chunks[stage::pp]) for stage in range(pp)]


@pytest.mark.parametrize(("layers", "pp", "vpp", "vocabulary"), product((4, 5, 7), (2, 3), (1, 2), (300, 6000, 60000)))
def test_no_division_is_better(layers: int, pp: int, vpp: int, vocabulary: int) -> None:
    if layers < pp * vpp:
        return
    config = staged(small_config(model={"num_layers": layers, "vocab_size": vocabulary}), pp, vpp)
    heads = heads_in_layers(config)

    def slowest(stages: tuple[int, ...]) -> float:
        return max(*stages[:-1], stages[-1] + heads)

    every = [stages for stages in product(range(vpp, layers + 1), repeat=pp) if sum(stages) == layers]
    chosen = stage_layers(config)
    assert sum(chosen) == layers and min(chunk_layers(config)) >= 1
    assert slowest(tuple(chosen)) == pytest.approx(min(map(slowest, every)))


def test_an_explicit_layout_is_taken() -> None:
    assert chunk_layers(staged(small_config(), 2, layout="Ettt|tL")) == [3, 1]
