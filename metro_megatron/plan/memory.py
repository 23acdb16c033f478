"""Memory of one GPU: weights, gradients, optimizer state, and what forward leaves for backward.

`zero_memory` is METRO's Table 4, `run_memory` a run of ours. The latter counts what our kernels keep (docs/kernels.md):
no scores, no probabilities, no dropout masks, logits one chunk at a time. It leaves out what the driver, the
communication library and the allocator take.

Legend: T token slots of a micro batch, M of them masked, H hidden, F feed-forward, A heads, D width of the token table,
V vocabulary rows; tp, pp, dp sizes of the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fused.linear_cross_entropy.operator import CHUNK
from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import Config, EncoderSizes
from metro_megatron.plan.flops import proposer, proposer_passes
from metro_megatron.plan.parameters import SHARED, Home, is_projected, matrices, parts, trained
from metro_megatron.plan.stages import stage_layers

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Of a number, by train.precision."""
MASTER, MOMENTS, GRADIENT_COPY = 4, 8, 4
"""FP32 master weight, Adam's two moments, FP32 gradient: of every parameter, on the rank that updates it."""
MUON_MOMENT = 4
"""Muon's one, in place of Adam's two."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """Master weights, moments, and FP32 copies of gradients in another format while they are applied."""
    activations: float = 0.0
    """What backward needs of layers and embedding, and the largest temporaries of a layer."""
    heads: float = 0.0
    """Rows and logits of a vocabulary head, and the token embedding's gradient before it is added up."""

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.activations + self.heads


def zero_memory(parameters: float, stage: int, gpus: int) -> Memory:
    """By ZeRO stage 0 to 3 with weights and gradients in half precision: 2 + 2 + 16 bytes a parameter (METRO Table 4).

    16: master weight, moments and an FP32 copy of the gradient; the paper's text names the first three alone, 12 bytes,
    but its 96 GB are 16. Stage 1 shards these over the GPUs, stage 2 gradients too, stage 3 weights too.
    """
    share = parameters / gpus
    return Memory(
        weights=2 * (share if stage >= 3 else parameters),
        gradients=2 * (share if stage >= 2 else parameters),
        optimizer=(MASTER + MOMENTS + GRADIENT_COPY) * (share if stage >= 1 else parameters),
    )


def state_bytes(config: Config) -> float:
    """Weights, gradients and optimizer state on one device: 18 bytes a parameter in bf16."""
    weights, gradients, state = parameter_bytes(config)
    saved = (MOMENTS - MUON_MOMENT) * sum(_muon_matrices(alone(config), 0))
    return trained(config) * (weights + gradients + state) + _frozen(config) * weights - saved


def alone(config: Config) -> Config:
    """The same run on one process."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        pipeline_model_parallel_layout="",
        sequence_parallel=False,
    )
    return replace(config, parallel=parallel)


def parameter_bytes(config: Config) -> tuple[int, int, int]:
    """(weight, gradient, optimizer state) of a parameter; the last is sharded over the replicas of its home.

    FP32 weights are their own masters. A gradient in half precision is copied to FP32 to be applied.
    """
    weight = BYTES[config.train.precision]
    gradient = 4 if config.parallel.grad_reduce_in_fp32 else weight
    return weight, gradient, MOMENTS + (MASTER if weight < 4 else 0) + (GRADIENT_COPY if gradient < 4 else 0)


def run_memory(config: Config, world_size: int, fill: float = 1.0) -> Memory:
    """Of the rank that needs most: the two homes of parallel/homes.py, and the larger of the step's two phases."""
    stages = decisive_stages(config)
    return max((rank_memory(config, world_size, stage, fill) for stage in stages), key=lambda one: one.total)


def decisive_stages(config: Config) -> set[int]:
    """One of which has most of everything: the last, and of as many layers the earliest."""
    layers = stage_layers(config)
    return {len(layers) - 1, *map(layers.index, layers)}


def rank_memory(config: Config, world_size: int, stage: int, fill: float = 1.0) -> Memory:
    """Of a rank in pipeline stage `stage`.

    The shared home (tied and auxiliary) is on every stage with its state sharded over dp x pp ranks, the stage home
    on its stage, sharded over dp.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    shared, own = home_parameters(config, stage)
    weight, gradient, state = parameter_bytes(config)
    shared_muon, own_muon = _muon_matrices(config, stage)
    saved = (MOMENTS - MUON_MOMENT) * (shared_muon / (dp * pp) + own_muon / dp)
    config, count = laid_out(config, world_size, fill)
    phases = [_corruption_phase(config), _main_phase(config, count, stage)]
    activations, heads = max(phases, key=sum)
    return Memory(
        weights=weight * (shared + own + _frozen(config)),
        gradients=gradient * (shared + own),
        optimizer=state * (shared / (dp * pp) + own / dp) - saved,
        activations=activations,
        heads=heads,
    )


def home_parameters(config: Config, stage: int) -> tuple[float, float]:
    """Parameters on a rank of a pipeline stage: (shared home, stage home)."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    layers = stage_layers(config)[stage] / config.model.num_layers
    found = {"layers": layers, "first": stage == 0, "last": stage == pp - 1}
    return trained_in(config, *SHARED), sum(part.on_rank(tp) * found.get(part.home, 0) for part in parts(config))


def trained_in(config: Config, *homes: Home) -> float:
    """Parameters of whole homes on a rank."""
    tp = config.parallel.tensor_model_parallel_size
    return sum(part.on_rank(tp) for part in parts(config) if part.home in homes)


def _muon_matrices(config: Config, stage: int) -> tuple[float, float]:
    """Parameters on a rank of a pipeline stage that Muon updates: (shared home, stage home)."""
    optimizer, tp = config.optimizer, config.parallel.tensor_model_parallel_size
    has_auxiliary = config.corruption.trains_auxiliary and optimizer.auxiliary_matrices == "muon"
    shared = matrices(config.model.auxiliary) / tp if has_auxiliary else 0.0
    main = replace(config.model.main, num_layers=stage_layers(config)[stage])
    return shared, matrices(main) / tp if optimizer.matrices == "muon" else 0.0


def _frozen(config: Config) -> int:
    """Weights of a frozen auxiliary, whole on every rank."""
    return sum(part.total for part in parts(config) if part.home == "frozen")


def _corruption_phase(config: Config) -> tuple[float, float]:
    """(activations, heads) while the auxiliary runs: one micro batch at a time."""
    passes, sizes = proposer_passes(config), proposer(config)
    if passes == 0:
        return 0.0, 0.0
    if passes == 1:
        # Forward only: a layer's temporaries, and the chunk of logits.
        return _temporaries(config, sizes), _logits(config)
    if config.corruption.source == "main" and config.parallel.recompute == "full":  # not there
        config = replace(config, parallel=replace(config.parallel, recompute="none"))
    return encoder_bytes(config, sizes, sizes.num_layers) + _temporaries(config, sizes), _head(
        config, sizes, is_dense=True
    )


def _main_phase(config: Config, count: int, stage: int) -> tuple[float, float]:
    """(activations, heads) of main: of count micro batches those whose backward is still to come, on this stage."""
    parallel, objective, sizes = config.parallel, config.objective, config.model.main
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    # megatron-core's schedules: plain, and interleaved, where a chunk of 1 / vpp of the layers is passed at a time.
    chunks = min(count, pp - stage) if vpp == 1 else min(count * vpp, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1)
    views = 2 if "scl" in objective.main else 1  # the cropped view is read in the same pass
    layers = stage_layers(config)[stage] / vpp
    kept = views * chunks * encoder_bytes(config, sizes, layers, has_embedding=stage == 0)
    heads = 0.0
    if stage == pp - 1 and {"clm", "mlm"} & set(objective.main):
        heads = _head(config, sizes, is_dense=config.model.lm_head == "dense")
    return kept + views * _temporaries(config, sizes), heads


def laid_out(config: Config, world_size: int, fill: float = 1.0) -> tuple[Config, int]:
    """(the configuration with micro batches as large as those of its steps, how many of them a rank's step has).

    fill: share of data.seq_length that a sample has on average. Samples are all as long.
    """
    train, data, parallel = config.train, config.data, config.parallel
    dp, length = world_size // parallel.model_ranks, data.seq_length * fill
    rule = RowRule.of(config, dp)
    samples = train.global_batch_size or train.global_batch_tokens / length
    if not data.is_packed:
        count = math.ceil(samples / (data.micro_batch_size * dp))
        return config, max(count, rule.least_micro_batches)
    rows, places = rule.first_try(round(samples * length), int(samples), round(length))
    return replace(config, data=replace(data, micro_batch_tokens=places)), rows // dp


def _sequence_share(config: Config) -> int:
    """Over how many ranks the positions between matrices are split."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


def encoder_bytes(config: Config, sizes: EncoderSizes, layers: float, has_embedding: bool = True) -> float:
    """What a micro batch leaves behind in some layers, the embedding and pre-LN's last norm."""
    slots, number = config.data.micro_batch_slots, BYTES[config.train.precision]
    # The sum that is normalized with its mean and deviation; the projection's input.
    tables = number * config.model.table_width * (1 + is_projected(sizes, config.model)) + 8
    embedding = slots * tables / _sequence_share(config) if has_embedding else 0.0
    norm = slots * (number * sizes.hidden_size + 8) / _sequence_share(config) if config.model.norm_first else 0.0
    if config.parallel.recompute == "full":
        return embedding + slots * sizes.hidden_size * number / _sequence_share(config) * layers + norm
    return embedding + norm + layer_bytes(config, sizes) * layers


def layer_bytes(config: Config, sizes: EncoderSizes) -> float:
    """What a layer keeps of a micro batch, 32 T H bytes in bf16 with F = 4 H, and 4 T (A + 4) of numbers in FP32.

    [T, H] four times where positions may be split: the inputs of q, k, v and of the MLP, and the two sums that are
    normalized. Split over heads or the MLP's width: q, k, v, attention's output, the MLP before and after GELU. FP32:
    attention's log-sum-exp, mean and deviation of two norms. Pre-LN keeps two dropout masks of a byte, too. What
    parallel.recompute_modules names is not kept.
    """
    slots, number = config.data.micro_batch_slots, BYTES[config.train.precision]
    tp, sequence = config.parallel.tensor_model_parallel_size, _sequence_share(config)
    masks = 2 * sizes.hidden_size / sequence if config.model.norm_first and config.model.hidden_dropout else 0.0
    between = number * 4 * sizes.hidden_size / sequence
    inside = number * (4 * sizes.hidden_size + 2 * sizes.ffn_hidden_size) / tp
    kept = slots * (between + inside + masks + 4 * sizes.num_attention_heads / tp + 16 / sequence)
    return kept - sum(_module_bytes(config, sizes).values())


def _module_bytes(config: Config, sizes: EncoderSizes) -> dict[str, float]:
    """What each of parallel.recompute_modules keeps that is made again: its outputs, and the norm before an MLP."""
    parallel, number = config.parallel, BYTES[config.train.precision]
    if parallel.recompute != "selective":
        return {}
    tp, hidden, norm = parallel.tensor_model_parallel_size, sizes.hidden_size, 0.0
    if config.model.norm_first:  # with its mean and deviation
        norm = (number * hidden + 8) / _sequence_share(config)
    inner = number * sizes.ffn_hidden_size / tp
    by_module = {
        "core_attn": (number * hidden + 4 * sizes.num_attention_heads) / tp,
        "layernorm": norm if "mlp" in parallel.recompute_modules else 2 * norm,
        "mlp": norm + 2 * inner,
        "mlp_act": inner,
    }
    return {name: config.data.micro_batch_slots * by_module[name] for name in parallel.recompute_modules}


def _temporaries(config: Config, sizes: EncoderSizes) -> float:
    """Of a layer's backward: what is recomputed, two gradients of the MLP's width, two of the hidden states."""
    slots, number = config.data.micro_batch_slots, BYTES[config.train.precision]
    tp = config.parallel.tensor_model_parallel_size
    recomputed = max(_module_bytes(config, sizes).values(), default=0.0)
    if config.parallel.recompute == "full":
        recomputed = layer_bytes(config, sizes)
    return recomputed + slots * number * (2 * sizes.ffn_hidden_size / tp + 2 * sizes.hidden_size)


def _head(config: Config, sizes: EncoderSizes, is_dense: bool) -> float:
    """Hidden states [T, H] and rows [M, D] of a vocabulary head, two chunks of logits, the table's gradients [V, D]."""
    number, tp = BYTES[config.train.precision], config.parallel.tensor_model_parallel_size
    slots = config.data.micro_batch_slots
    masked = config.objective.mask_probability * slots
    rows = masked * ((sizes.hidden_size + 3 * config.model.table_width) if is_dense else config.model.table_width)
    # The decoder's and the look-up's, which autograd adds up before they reach the gradient buffer.
    gradients = 2 * config.model.padded_vocab_size / tp * config.model.table_width
    return number * (slots * sizes.hidden_size + rows + gradients) + _logits(config)


def _logits(config: Config) -> float:
    """Two chunks [M, C] of fused.linear_cross_entropy: logits, and their gradients."""
    chunk = min(CHUNK, config.model.padded_vocab_size // config.parallel.tensor_model_parallel_size)
    masked = config.objective.mask_probability * config.data.micro_batch_slots
    return 2 * BYTES[config.train.precision] * masked * chunk
