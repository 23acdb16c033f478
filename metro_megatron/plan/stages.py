"""Which of main's layers each stage of the pipeline holds, and how long a stage takes for them."""

from __future__ import annotations

from functools import cache

from metro_megatron.config.schema import Config
from metro_megatron.config.stages import layers_of_layout
from metro_megatron.plan.flops import Amount, done_flops


def chunk_layers(config: Config) -> list[int]:
    """Layers of every chunk, from the bottom up: stage 0's first chunk, stage 1's first ... stage 0's second ...

    As parallel.pipeline_model_parallel_layout says, or balanced: every chunk has a layer, and each further one goes to
    the stage with the least to multiply, there to the chunk with the least. The last stage has the heads beside its
    layers. Of equal stages the later one gets it: earlier ones keep more micro batches.
    """
    parallel = config.parallel
    if parallel.pipeline_model_parallel_layout:
        return layers_of_layout(parallel.pipeline_model_parallel_layout)
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    return list(_balanced(config.model.num_layers, pp, vpp, heads_in_layers(config)))


@cache
def _balanced(num_layers: int, pp: int, vpp: int, heads: float) -> tuple[int, ...]:
    layers, work = [1] * (pp * vpp), [1.0] * (pp * vpp)
    work[-1] += heads
    for _ in range(num_layers - pp * vpp):
        stage = min(reversed(range(pp)), key=lambda stage: sum(work[stage::pp]))
        chunk = min(range(stage, pp * vpp, pp), key=work.__getitem__)
        layers[chunk] += 1
        work[chunk] += 1
    return tuple(layers)


def stage_layers(config: Config) -> list[int]:
    """Layers of every stage, all its chunks together."""
    pp, chunks = config.parallel.pipeline_model_parallel_size, chunk_layers(config)
    return [sum(chunks[stage::pp]) for stage in range(pp)]


def heads_in_layers(config: Config) -> float:
    """How many of main's layers have as much to multiply as its heads, in samples of data.seq_length."""
    amount = Amount.of_samples(1, config.data.seq_length)
    return config.model.num_layers * done_flops(config, amount, "heads") / done_flops(config, amount, "layers")
