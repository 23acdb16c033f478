"""A run rehearsed before there is a cluster: pretrain_metro.py --dry_run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from metro_megatron.cli.options import Range, at_least
from metro_megatron.commands.plan import launch_command
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.errors import UserError
from metro_megatron.plan.gpus import GPUS, NODE

FROM_FILES = ("cached", "frozen", "unigram")
"""Of corruption.source: what it needs is in files of the run."""


@dataclass(frozen=True)
class Options:
    """What a run is rehearsed for."""

    world_size: Annotated[int, at_least(1)]
    """Processes of the run, one a GPU: as many as a node of 8 has, or whole nodes."""
    gpu: Literal["a100-40g", "a100-80g", "h100", "h200", "b200"] = "a100-80g"
    """Which GPUs; metro_megatron/plan/gpus.py has their data sheets' figures."""
    efficiency: Annotated[float, Range(0, 1, has_low=False, has_high=True)] = 0.5
    """Share of the data sheet's matrix rate that compute reaches: of what bench_train.py measures, or a guess."""
    network_gb_per_s: Annotated[float, at_least(0)] = 0.0
    """What each GPU gets from collectives between nodes (nccl-tests' bus bandwidth); 0: 88% of one adapter a GPU."""
    processes: Annotated[int, at_least(1)] = 2
    """Processes that trace ranks side by side, on this machine."""
    picture: str = ""
    """Where to draw the step, ranks by time: .png, .svg or .pdf. Needs matplotlib; empty: no picture."""


def rehearse(options: Options, others: list[str]) -> int:
    """Rehearse two steps of a run on this machine, without GPUs and without its data (--dry_run).

    The program's own step is traced for one rank of each class, on tensors without values. Said are parameters and
    bytes by component, the calls of the communication library, whether all ranks make them in the same order, and the
    time of a step by the plan's simple model. Options that are not listed here are those of a run (--config YAML...,
    --section.name VALUE...); where data.train is not at hand, documents are as long as Wikipedia's are assumed to be.
    docs/rehearsal.md says what is shown by it. Exit codes: 0 rehearsed, 1 ranks would wait for each other, 2 something
    is wrong with the options, with the reason.
    """
    config = _with_paths(with_vocabulary(parse_config(others)))
    _refuse(config, options.world_size)
    # Late: all of this loads torch.
    from metro_megatron.train.launch import import_megatron

    import_megatron()
    from metro_megatron.plan.layouts import NETWORK_SHARE, Cluster
    from metro_megatron.rehearsal.documents import Documents
    from metro_megatron.rehearsal.run import Rehearsal

    gpu, begun = GPUS[options.gpu], time.monotonic()
    network = 1e9 * options.network_gb_per_s or NETWORK_SHARE * gpu.network
    documents = Documents.find(config)
    cluster = Cluster(gpu, options.world_size, options.efficiency, network, documents.fill)
    print(f"documents: {documents.description}")
    advice = documents.advice(options.world_size // config.parallel.model_ranks)
    if advice:
        print(f"warning: {advice}")
    rehearsal = Rehearsal.of(documents, cluster, options.processes, _say_traced)
    faults = rehearsal.faults()
    if faults:
        print(*(f"error: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        return 1
    for section in rehearsal.sections(Path(options.picture) if options.picture else None):
        print("", *section, sep="\n")
    print(
        f"\nrehearsed {rehearsal.ranks} by {len(rehearsal.traces)} of them in {time.monotonic() - begun:,.0f} s: "
        f"all make the same calls in the same order{f'; made {options.picture}' if options.picture else ''}\n"
        f"next:\n  {launch_command(options.world_size, others, {})}"
    )
    return 0


def _refuse(config: Config, world_size: int) -> None:
    """Raise UserError with all that keeps the run from starting, or from being rehearsed."""
    from metro_megatron.config.problems import problems

    found = problems(config, world_size, "cuda")
    if world_size > NODE and world_size % NODE:
        found.append(f"--world_size is {world_size}, must be at most {NODE} or a multiple of it: whole nodes")
    if config.corruption.source in FROM_FILES:
        found.append(
            f"corruption.source is {config.corruption.source}, which reads files of the run and is not rehearsed; "
            "rehearse with --corruption.source auxiliary or uniform"
        )
    if config.train.phases:
        found.append(
            "train.phases: steps of one phase are rehearsed; ask for each phase with its options in their places, and "
            "--train.phases=[]"
        )
    if found:
        raise UserError(found)


def _with_paths(config: Config) -> Config:
    """A rehearsal needs no data and no run folder."""
    data, train = config.data, config.train
    return replace(
        config,
        data=replace(data, train=data.train or ["PREFIX"]),
        train=replace(train, output=train.output or "DIR"),
    )


def _say_traced(rank: int) -> None:
    print(f"traced rank {rank:,}", file=sys.stderr, flush=True)
