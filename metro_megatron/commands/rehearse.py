"""A run rehearsed before there is a cluster: pretrain_metro.py --dry_run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.options import at_least
from metro_megatron.cli.picture import refuse_picture
from metro_megatron.commands.plan import Hardware, launch_command
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.errors import UserError
from metro_megatron.plan.gpus import NODE

FROM_FILES = ("cached", "frozen", "unigram")
"""Of corruption.source: what it needs is in files of the run."""
REHEARSED = """\
rehearsed: what the parts of a run gather at its start, two steps, an evaluation, and what a save asks of other ranks
not rehearsed: making groups, looks at the run folder, loading, the self-check, writing"""
STOOD_IN = "not rehearsed: Transformer Engine's layers (parallel.transformer_impl), for which megatron-core's stood in"


@dataclass(frozen=True, kw_only=True)
class Options(Hardware):
    """What a run is rehearsed for."""

    world_size: Annotated[int, at_least(1)]
    """Processes of the run, one a GPU: as many as a node of 8 has, or whole nodes."""
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
    from metro_megatron.rehearsal.documents import Documents
    from metro_megatron.rehearsal.run import Rehearsal

    picture = Path(options.picture) if options.picture else None
    if picture:
        refuse_picture(picture)
    begun, documents = time.monotonic(), Documents.find(config)
    cluster = options.cluster(options.world_size, documents.fill)
    print(f"documents: {documents.description}")
    advice = documents.advice(options.world_size // config.parallel.model_ranks)
    if advice:
        print(f"warning: {advice}")
    rehearsal = Rehearsal.of(documents, cluster, options.processes, _say_traced)
    faults = rehearsal.faults()
    if faults:
        print(*(f"error: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        return 1
    for section in rehearsal.sections(picture):
        print("", *section, sep="\n")
    said = REHEARSED if config.parallel.transformer_impl == "local" else f"{REHEARSED}\n{STOOD_IN}"
    print(
        f"\nrehearsed {rehearsal.ranks} by {len(rehearsal.traces)} of them in {time.monotonic() - begun:,.0f} s: "
        f"all make the same calls in the same order{f'; made {picture}' if picture else ''}\n"
        f"{said}\n"
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
