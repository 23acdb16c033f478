"""What a run costs: parameters, FLOPs, memory, time, and the best layout for a number of GPUs."""

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from metro_megatron.cli.command_line import pretraining_command, run_printing_tool
from metro_megatron.cli.options import Range, at_least, flatten
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.errors import UserError
from metro_megatron.plan.gpus import GPUS, NODE

if TYPE_CHECKING:
    from metro_megatron.plan.layouts import Cluster


@dataclass(frozen=True)
class Hardware:
    """What a run's time is reckoned with."""

    gpu: Literal["a100-40g", "a100-80g", "h100", "h200", "b200"] = "a100-80g"
    """Which ones; metro_megatron/plan/gpus.py has their data sheets' figures."""
    efficiency: Annotated[float, Range(0, 1, has_low=False, has_high=True)] = 0.5
    """Share of the data sheet's matrix rate that compute reaches: of what bench_train.py measures, or a guess."""
    network_gb_per_s: Annotated[float, at_least(0)] = 0.0
    """What each GPU gets from collectives between nodes (nccl-tests' bus bandwidth); 0: 88% of one adapter a GPU."""

    def cluster(self, gpus: int, sample_fill: float) -> "Cluster":
        """So many of these GPUs; sample_fill: share of data.seq_length that a sample has on average."""
        from metro_megatron.plan.layouts import NETWORK_SHARE, Cluster

        gpu = GPUS[self.gpu]
        network = 1e9 * self.network_gb_per_s or NETWORK_SHARE * gpu.network
        return Cluster(gpu, gpus, self.efficiency, network, sample_fill)


@dataclass(frozen=True)
class Options(Hardware):
    """What a run is planned for."""

    gpus: Annotated[int, at_least(1)] = 8
    """GPUs: as many as a node of 8 has, or whole nodes."""
    sample_fill: Annotated[float, Range(0, 1, has_low=False, has_high=True)] = 1.0
    """Share of data.seq_length that a sample has on average, as build_index.py prints it."""
    runners_up: Annotated[int, at_least(0)] = 4
    """Layouts to show beside the best one, each with the reason why it loses."""
    json: bool = False
    """Numbers instead of text."""


def main(options: Options, others: list[str]) -> None:
    """Say what a run costs, without building a model, and find its best layout by a simple model of time.

    Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...).
    docs/plan.md says what is assumed. Exit codes: 0 planned, 2 nothing fits or something is wrong, with the reason.
    """
    config = _with_paths(with_vocabulary(parse_config(others)))
    # Late: the configuration's checks load torch.
    from metro_megatron.config.problems import problems
    from metro_megatron.plan.layouts import estimate, layouts
    from metro_megatron.plan.report import chosen, plan, text

    if options.gpus > NODE and options.gpus % NODE:
        raise UserError(f"--gpus is {options.gpus}, must be at most {NODE} or a multiple of it: whole nodes")
    cluster = options.cluster(options.gpus, options.sample_fill)
    if config.train.phases:
        raise UserError(
            "train.phases: a plan is of a run that is all in one phase; ask for each with its options in their places, "
            "and --train.phases=[]"
        )
    wrong = problems(config, options.gpus, "cuda")
    all_layouts = layouts(config, cluster)
    if not all_layouts:
        raise UserError(wrong)
    own = None if wrong else estimate(config, cluster)
    best = chosen(all_layouts, own, options.runners_up)
    if not best:
        least = min(all_layouts, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout fits {options.gpus} x {options.gpu}: the least is {least.memory.total / 1e9:,.1f} GB of "
            f"{cluster.memory_limit / 1e9:,.1f}, with {_written(least.options)}; give more --gpus or another --gpu"
        )
    made = plan(config, cluster, own, best)
    if options.json:
        print(json.dumps(made, indent=2))
        return
    print(text(made, config, cluster, options.gpu))
    for one in wrong:
        print(f"\nnot as configured: {one}")
    print()
    print(f"next:\n  {launch_command(options.gpus, others, _changes(config, best[0].options))}")


def _with_paths(config: Config) -> Config:
    """A plan needs no data, no run folder, no frozen model and no cache."""
    data, train, corruption = config.data, config.train, config.corruption
    if corruption.source == "frozen":
        corruption = replace(corruption, frozen_model=corruption.frozen_model or "MODEL")
    if corruption.source == "cached":
        corruption = replace(corruption, cache=corruption.cache or "CACHE")
    return replace(
        config,
        corruption=corruption,
        data=replace(data, train=data.train or ["PREFIX"]),
        train=replace(train, output=train.output or "DIR"),
    )


def _changes(config: Config, layout: Mapping[str, object]) -> dict[str, object]:
    """What a layout changes of the configuration."""
    values = flatten(config)
    return {name: value for name, value in layout.items() if value != values[name]}


def launch_command(gpus: int, others: list[str], changes: Mapping[str, object]) -> str:
    """How to start the planned run."""
    nodes = -(-gpus // NODE)
    processes = f"{f'--nnodes {nodes} ' if nodes > 1 else ''}--nproc-per-node {gpus // nodes}"
    script = pretraining_command().partition(" --config")[0].replace("--nproc-per-node 1", processes)
    words = " ".join(filter(None, [script, shlex.join(others), _written(changes), "..."]))
    return " \\\n      ".join(textwrap.wrap(words, 110, break_long_words=False, break_on_hyphens=False))


def _written(layout: Mapping[str, object]) -> str:
    return " ".join(
        f"--{name} {' '.join(value)}" if isinstance(value, list) else f"--{name}={str(value).lower()}"
        for name, value in layout.items()
    )


run = partial(run_printing_tool, main)
"""The console script."""
