"""How long a step takes on so many GPUs, by a simple model, and which layout takes least.

Nothing is measured here. Compute runs at a stated share of the data sheet's rate, whatever the sizes of matrices;
collectives at stated shares of their links' rates. A step is, one after another:

    phase 1    the auxiliary's share of micro batches
    phase 2    (M + (pp - 1) / vpp) times a micro batch on the slowest stage (plan/stages.py), heads included
    tensor     10 transfers of [T, H] (tp - 1) / tp a layer, 4 in forward; 4 more where layers are recomputed
    pipeline   2 vpp transfers of [T, H] a micro batch
    data       what does not hide: see `_data_seconds`
    optimizer  30 bytes of every parameter that a rank updates

Legend: M micro batches of a rank, T token slots of one, H hidden; tp, pp, vpp, dp sizes of the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config
from metro_megatron.plan.flops import Amount, done_flops, model_flops, proposer, proposer_passes
from metro_megatron.plan.gpus import NODE, Gpu
from metro_megatron.plan.memory import (
    BYTES,
    Memory,
    decisive_stages,
    home_parameters,
    laid_out,
    parameter_bytes,
    run_memory,
    trained_in,
)
from metro_megatron.plan.stages import stage_layers

NVLINK_SHARE, NETWORK_SHARE = 0.77, 0.88
"""Of the links' rates that collectives reach: 230 of 300 and 22 of 25 GB/s on DGX A100."""
MEMORY_SHARE = 0.8
"""Of the memory's rate that Adam reaches."""
ADAM_BYTES = 30
"""Read and written for a parameter: gradient, master and moments in FP32, weight in half precision."""
LAUNCH_S = 0.5e-3
"""The least that a layer's forward and backward take, however small: some 50 launches of 10 us."""
SLOTS = (2048, 4096, 8192, 16384)
"""Token slots of the micro batches that are tried: smaller products leave processors idle, larger ones gain nothing."""
RESERVE = 0.08
"""Of the GPU's memory, for driver, communication library and fragments."""


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for."""

    gpu: Gpu
    gpus: int
    efficiency: float
    """Share of gpu.peak that compute reaches."""
    network: float
    """Bytes a second that each GPU gets from collectives across nodes: nccl-tests' bus bandwidth."""
    fill: float = 1.0
    """Share of data.seq_length that a sample has on average: what padded rows waste, packed ones do not."""

    def bandwidth(self, reach: int) -> float:
        """Of a group whose ranks lie within `reach` consecutive ones."""
        return self.gpu.nvlink * NVLINK_SHARE if reach <= NODE else self.network

    @property
    def memory_limit(self) -> float:
        return (1 - RESERVE) * self.gpu.memory


@dataclass(frozen=True)
class Seconds:
    """Of a step, by what takes them."""

    corruption: float
    main: float
    """If all stages had equal work and none ever waited."""
    bubble: float
    """Stages that wait, for the first micro batch, after the last, and for the slowest one."""
    tensor: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a run takes in one layout."""

    config: Config
    cluster: Cluster
    seconds: Seconds
    memory: Memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.memory_limit

    @property
    def real(self) -> Amount:
        """Of a step, without padding."""
        return step_amount(self.config, self.cluster.fill)

    @property
    def tokens_per_second(self) -> float:
        """Real ones."""
        return self.real.tokens / self.seconds.total

    @property
    def mfu(self) -> float:
        """Model FLOPs of real tokens, of what the GPUs could do."""
        rate = self.cluster.gpus * self.cluster.gpu.peak(self.config.train.precision) * 1e12
        return model_flops(self.config, self.real) / self.seconds.total / rate

    @property
    def days(self) -> float:
        return self.seconds.total * self.config.train.train_steps / 86400

    @property
    def options(self) -> dict[str, int | str | bool | list[str]]:
        """What a layout is, by option."""
        parallel, data = self.config.parallel, self.config.data
        row = "micro_batch_tokens" if data.is_packed else "micro_batch_size"
        return {
            "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "parallel.pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
            "parallel.sequence_parallel": parallel.sequence_parallel,
            "parallel.recompute": parallel.recompute,
            "parallel.recompute_modules": list(parallel.recompute_modules),
            f"data.{row}": getattr(data, row),
        }


def step_amount(config: Config, fill: float) -> Amount:
    """Real tokens of a step whose samples have the share fill of data.seq_length each."""
    train, length = config.train, config.data.seq_length * fill
    return Amount.of_samples(train.global_batch_size or train.global_batch_tokens / length, length)


def estimate(configured: Config, cluster: Cluster) -> Estimate:
    """Of a configuration without problems on so many GPUs."""
    config, count = laid_out(configured, cluster.gpus, cluster.fill)
    parallel, data = config.parallel, config.data
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    own = -(-count // pp)  # of phase 1's micro batches
    # Matrices are multiplied for padding, too; attention works on samples alone.
    length, share = data.seq_length * cluster.fill, 1.0 if data.is_packed else cluster.fill
    slots = data.micro_batch_slots
    amount = Amount(slots, slots * share * length, slots * share / length, 1)
    rate = cluster.gpu.peak(config.train.precision) * 1e12 * cluster.efficiency * tp
    layers = max(done_flops(config, amount, "layers") / rate, config.model.num_layers * LAUNCH_S)
    heads = done_flops(config, amount, "heads") / rate
    of_stages = [layers * share / config.model.num_layers for share in stage_layers(config)]
    of_stages[-1] += heads
    main, slowest = count * (layers + heads) / pp, max(of_stages)
    phase_1 = own * _corruption_seconds(config, amount, rate)
    phase_2 = (count + (pp - 1) / vpp) * slowest
    seconds = Seconds(
        corruption=phase_1,
        main=main,
        bubble=phase_2 - main,
        tensor=_tensor_seconds(config, cluster, count, own),
        pipeline=_pipeline_seconds(config, cluster, count),
        data=_data_seconds(config, cluster, phase_1, phase_2, slowest),
        optimizer=_optimizer_seconds(config, cluster),
    )
    return Estimate(configured, cluster, seconds, run_memory(configured, cluster.gpus, cluster.fill))


def _corruption_seconds(config: Config, amount: Amount, rate: float) -> float:
    """Of one micro batch. A frozen auxiliary is not shared out: every tensor-parallel rank runs all of it."""
    if config.corruption.source == "frozen":
        rate /= config.parallel.tensor_model_parallel_size
    least = proposer(config).num_layers * LAUNCH_S if proposer_passes(config) else 0.0
    return max(done_flops(config, amount, "corruption") / rate, least)


def _tensor_seconds(config: Config, cluster: Cluster, count: int, own: int) -> float:
    parallel, main, auxiliary = config.parallel, config.model.main, proposer(config)
    tp = parallel.tensor_model_parallel_size
    # An all-reduce, of which there are four without sequence parallelism, is two transfers.
    transfers = (10 if parallel.sequence_parallel else 8) + (4 if parallel.recompute == "full" else 0)
    rows = count * max(stage_layers(config)) * main.hidden_size
    if proposer_passes(config) >= 3:
        rows += own * auxiliary.num_layers * auxiliary.hidden_size
    sent = transfers * rows * config.data.micro_batch_slots * BYTES[config.train.precision] * (tp - 1) / tp
    return sent / cluster.bandwidth(tp)


def _pipeline_seconds(config: Config, cluster: Cluster, count: int) -> float:
    """A stage's neighbours are world size / pp ranks away."""
    parallel, hidden = config.parallel, config.model.hidden_size
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 0.0
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    row = config.data.micro_batch_slots * hidden * BYTES[config.train.precision] / split
    return 2 * vpp * count * row / cluster.bandwidth(cluster.gpus)


def _data_seconds(config: Config, cluster: Cluster, phase_1: float, phase_2: float, slowest: float) -> float:
    """Reducing gradients and gathering weights of both homes, but for what hides behind computation.

    With parallel.overlap: the auxiliary's reduction behind phase 2, the stages' behind the last micro batch's backward,
    2/3 of it, and their gathering behind phase 1. What both phases use is waited for.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = cluster.gpus // (tp * pp)
    weight, gradient, _ = parameter_bytes(config)
    homes = [home_parameters(config, stage) for stage in decisive_stages(config)]
    shared, stage = homes[0][0], max(own for _, own in homes)
    auxiliary = trained_in(config, "auxiliary")
    across_shared = (dp * pp - 1) / (dp * pp) / cluster.bandwidth(cluster.gpus)
    across_stage = (dp - 1) / dp / cluster.bandwidth(tp * dp)
    hidden = (phase_2, 2 / 3 * slowest, phase_1) if parallel.overlap else (0.0, 0.0, 0.0)
    transfers = (auxiliary * gradient * across_shared, stage * gradient * across_stage, stage * weight * across_stage)
    waited = (shared - auxiliary) * gradient * across_shared + shared * weight * across_shared
    return waited + sum(max(0.0, transfer - behind) for transfer, behind in zip(transfers, hidden, strict=True))


def _optimizer_seconds(config: Config, cluster: Cluster) -> float:
    parallel = config.parallel
    replicas = cluster.gpus // parallel.model_ranks
    pp = parallel.pipeline_model_parallel_size
    homes = [home_parameters(config, stage) for stage in decisive_stages(config)]
    own = max(shared / (replicas * pp) + stage / replicas for shared, stage in homes)
    return ADAM_BYTES * own / (MEMORY_SHARE * cluster.gpu.memory_bandwidth)


def layouts(config: Config, cluster: Cluster) -> list[Estimate]:
    """Every layout that the configuration's checks admit, the fastest first; those that do not fit are among them.

    Tried are the configured one, tensor parallelism inside a node (with sequence parallelism, unless tokens leave
    early), pipelines with 1, 2 and 4 chunks a stage, balanced, micro batches of SLOTS, and nothing, GELU (or what
    parallel.recompute_modules name) or layers recomputed.
    """
    candidates = list(_candidates(config, cluster.gpus))
    if config not in candidates:
        candidates.append(config)
    found = [estimate(one, cluster) for one in candidates if not problems(one, cluster.gpus, "cuda")]
    return sorted(found, key=lambda one: one.seconds.total)


def _candidates(config: Config, gpus: int) -> Iterator[Config]:
    sizes = [size for size in range(1, NODE + 1) if gpus % size == 0]
    stages = [size for size in range(1, config.model.num_layers + 1) if gpus % size == 0]
    batches = {max(1, slots // config.data.seq_length) for slots in SLOTS}
    recomputations = ("none", "selective", "full")
    for tp, pp, vpp, rows, recompute in product(sizes, stages, (1, 2, 4), sorted(batches), recomputations):
        if gpus % (tp * pp) or config.model.num_layers < pp * vpp or (pp == 1 and vpp > 1):
            continue  # also said by config.problems, at greater length
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            pipeline_model_parallel_layout="",
            sequence_parallel=tp > 1 and not config.early_exit.layers,
            recompute=recompute,  # type: ignore[arg-type]
            recompute_modules=(config if recompute == "selective" else Config()).parallel.recompute_modules,
        )
        data = replace(config.data, micro_batch_tokens=rows * config.data.seq_length, micro_batch_size=rows)
        yield replace(config, parallel=parallel, data=data)


def reason(loser: Estimate, winner: Estimate) -> str:
    """Why a layout is not the best one: memory, or where it loses most of its time."""
    if not loser.fits:
        return f"needs {loser.memory.total / 1e9:,.1f} GB of {loser.cluster.memory_limit / 1e9:,.1f}"
    more = {name: value - vars(winner.seconds)[name] for name, value in vars(loser.seconds).items()}
    worst = max(more, key=lambda name: more[name])
    return f"{1e3 * more[worst]:+,.1f} ms {LOSSES[worst]}"


LOSSES = {
    "corruption": "in the auxiliary's phase",
    "main": "of main's computation",
    "bubble": "of pipeline bubble",
    "tensor": "of tensor-parallel transfers",
    "pipeline": "of transfers between stages",
    "data": "of data-parallel transfers that do not hide",
    "optimizer": "in the optimizer",
}
"""What `reason` says of the parts of Seconds."""
