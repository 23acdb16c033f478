"""Datasets of token ids joined into one, such as the parts written by the tasks of a Slurm array."""

from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import pretraining_lines, run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.preprocess.merging import merge
from metro_megatron.preprocess.options import SHARD_BYTES


@dataclass(frozen=True)
class Options:
    """What to join."""

    input: list[str]
    """Prefixes of datasets; PREFIX.manifest.json is accepted, so that a glob can be given, quoted or not."""
    output_prefix: str
    """Prefix of the joined dataset."""
    shard_bytes: Annotated[int, at_least(1)] = SHARD_BYTES
    """Largest .bin."""
    overwrite: bool = False
    """Replace what is at the output prefix."""


def main(options: Options) -> None:
    """Join finished datasets in the given order, streaming; the inputs stay.

    All parts of a run, in order, give the very bytes of one run without parts. Exit codes: 0 done, 2 refused or
    impossible, with the reason, 130 Ctrl-C; the same command goes on where it was.
    """
    matches = [[name] if Path(name).exists() else sorted(glob(name)) or [name] for name in options.input]
    prefixes = [path.removesuffix(".manifest.json") for paths in matches for path in paths]
    manifest = merge(prefixes, options.output_prefix, options.shard_bytes, options.overwrite)
    print(
        f"{options.output_prefix}: {manifest.documents:,} documents, {manifest.units:,} units, "
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards"
    )
    print(*pretraining_lines([options.output_prefix], manifest.documents), sep="\n")


run = partial(run_tool, main)
"""The console script."""
