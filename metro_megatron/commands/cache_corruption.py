"""The replacements of a run with a frozen model, drawn before it: then no model but main runs in it (Fast-ELECTRA)."""

import os
import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import is_first_process, pretraining_command, run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import CountLines
from metro_megatron.errors import UserError


@dataclass(frozen=True)
class Options:
    """Where to, beside the options of the run."""

    output: str = ""
    """Folder of the cache; default: corruption_cache beside the first dataset."""
    steps_per_part: Annotated[int, at_least(1)] = 100
    """Steps of one file, which is what an interrupted command draws again."""


def main(options: Options, run: list[str]) -> None:
    """Write the replacements of a run: the options of pretrain_metro.py follow, with --corruption.source frozen.

    The ids are those that the run would draw, step by step, and those of its evaluations. An interrupted command
    continues when it is given again; what is damaged of a cache is drawn again. With torchrun, all its processes draw.
    Exit codes: 0 done, 2 refused or impossible, with the reason, 130 Ctrl-C.
    """
    from metro_megatron.config.file import parse_config
    from metro_megatron.config.problems import problems
    from metro_megatron.config.schema import ParallelConfig
    from metro_megatron.data.replacements import DEFAULT_FOLDER
    from metro_megatron.data.vocabulary import with_vocabulary
    from metro_megatron.train.launch import choose_device, import_megatron

    given = with_vocabulary(parse_config(run))
    # Every process has the whole model.
    config = replace(given, parallel=ParallelConfig(timeout_minutes=given.parallel.timeout_minutes))
    device = choose_device(config)
    found = problems(config, int(os.environ.get("WORLD_SIZE", 1)), device)
    if config.corruption.source != "frozen":
        found.append(f"corruption.source is {config.corruption.source}; only what a frozen model draws is cached")
    if config.train.phases:
        found.append("train.phases are given; caches are of runs without phases: draw in the run, or leave them empty")
    if found:
        raise UserError(found)
    import_megatron()
    import torch

    from metro_megatron.train.cache import write_cache
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.frozen_model import refuse_other_model

    corpus = Corpus.open(config)
    refuse_other_model(config, corpus.tokenizer_folder)
    path = Path(options.output) if options.output else Path(config.data.train[0]).parent / DEFAULT_FOLDER
    progress = CountLines(f"{{:,}} of {config.train.train_steps:,} steps drawn")
    written = write_cache(corpus, torch.device(device), path, options.steps_per_part, progress.show)
    if not is_first_process():
        return
    samples = f"{written.samples:,} samples" + (
        f", {written.validation_samples:,} of the evaluations" if written.validation_samples else ""
    )
    print(
        f"made {path}, {written.bytes / 1e6:,.1f} MB: {written.steps:,} steps of {samples}\n"
        f"next, with the other options of the run:\n  {pretraining_command()} ... --corruption.source cached "
        f"--corruption.cache {shlex.quote(str(path))}"
    )


run = partial(run_tool, main)
"""The console script."""
