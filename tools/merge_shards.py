"""Datasets of token ids joined into one, such as the parts written by the tasks of a Slurm array."""

import shlex

from metro_megatron.cli.command_line import run_tool
from metro_megatron.preprocess.merging import merge


def main(input: list[str], output_prefix: str, shard_bytes: int = 4_000_000_000, overwrite: bool = False) -> None:
    """Join finished datasets in the given order, streaming; the inputs stay.

    All parts of a run, in order, give the very bytes of one run without parts. Exit codes: 0 done, 2 refused or
    impossible, with the reason, 130 Ctrl-C; the same command goes on where it was.

    Args:
        input: Prefixes of datasets; PREFIX.manifest.json is accepted, so that a glob can be given.
        output_prefix: Prefix of the joined dataset.
        shard_bytes: Largest .bin.
        overwrite: Replace what is at the output prefix.
    """
    prefixes = [name.removesuffix(".manifest.json") for name in input]
    manifest = merge(prefixes, output_prefix, shard_bytes, overwrite)
    print(
        f"{output_prefix}: {manifest.documents:,} documents, {manifest.units:,} units, "
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards"
    )
    quoted = shlex.quote(output_prefix)
    print(
        "next:\n  torchrun --nproc-per-node 1 pretrain_metro.py --config examples/base.yaml "
        f"--model.vocab_size {manifest.vocab_size} --data.train {quoted} --train.output runs/base"
    )


if __name__ == "__main__":
    run_tool(main)
