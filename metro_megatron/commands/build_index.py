"""The sample indices of a pretraining run, built before it: pretrain_metro.py finds them, or builds them itself."""

import shlex
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

from metro_megatron.cli.command_line import pretraining_command, run_tool
from metro_megatron.cli.options import Range, at_least
from metro_megatron.cli.progress import CountLines
from metro_megatron.config.schema import DataConfig
from metro_megatron.data.identity import open_datasets
from metro_megatron.data.samples import SampleIndex, cache_folder, sample_indices


@dataclass(frozen=True)
class Options:
    """Those of a run's data that its indices depend on."""

    train: list[str]
    """Dataset prefixes, in the order of data.train."""
    seq_length: Annotated[int, at_least(3)] = 512
    """Longest sample in tokens, <s> and </s> included."""
    validation: list[str] = field(default_factory=list)
    """Dataset prefixes held out whole."""
    validation_fraction: Annotated[float, Range(0, 1)] = 0.0
    """Share of the training documents held out."""
    held_out_by: Literal["content", "place"] = "content"
    """By a hash of what."""
    index_cache: str = ""
    """Folder of the indices; default: sample_index beside the first dataset."""


def main(options: Options) -> None:
    """Build what data.train, data.seq_length, data.validation... of a run ask for; give the same values here.

    An index takes 14 bytes per sample and does not depend on seed, batch or layout. What is there already is kept.
    Exit codes: 0 done, 2 refused or impossible, with the reason, 130 Ctrl-C.
    """
    train = options.train
    data = DataConfig(**vars(options))
    start = time.monotonic()
    shards, held_out = open_datasets(train, options.validation)
    index, validation_index = sample_indices(data, shards, held_out, CountLines("{:,} samples found").show)
    print(f"{cache_folder(options.index_cache, train)}, {time.monotonic() - start:,.1f} s:")
    print(f"  training {describe(index)}")
    if validation_index:
        print(f"  held out {describe(validation_index)}")
    for number, prefix in enumerate(train):
        print(f"  {prefix}: {index.source_bounds[number + 1] - index.source_bounds[number]:,} samples")
    prefixes = " ".join(map(shlex.quote, train))
    print(f"next:\n  {pretraining_command()} --data.train {prefixes} ...")


def describe(index: SampleIndex) -> str:
    """Samples, tokens and how full rows of one sample each would be."""
    share = index.num_tokens / (len(index) * index.seq_length)
    return f"{len(index):,} samples, {index.num_tokens:,} tokens, {share:.1%} of seq_length on average"


run = partial(run_tool, main)
"""The console script."""
