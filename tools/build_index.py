"""The sample indices of a pretraining run, built before it: pretrain_metro.py finds them, or builds them itself."""

import shlex
import sys
import time

from metro_megatron.cli.command_line import run_tool
from metro_megatron.config.schema import DataConfig
from metro_megatron.data.index_cache import cache_folder, sample_indices
from metro_megatron.data.samples import SampleIndex
from metro_megatron.data.shards import open_shards

_SECONDS_BETWEEN_LINES = 10.0


def main(
    train: list[str],
    seq_length: int = 512,
    validation: list[str] = [],  # noqa: B006 - read only; the command line shows it
    validation_fraction: float = 0.0,
    index_cache: str = "",
) -> None:
    """Build what data.train, data.seq_length, data.validation... of a run ask for; give the same values here.

    An index takes 14 bytes per sample and does not depend on seed, batch or layout. What is there already is kept.
    Exit codes: 0 done, 2 refused or impossible, with the reason, 130 Ctrl-C.

    Args:
        train: Dataset prefixes, in the order of data.train.
        seq_length: Longest sample in tokens, <s> and </s> included.
        validation: Dataset prefixes held out whole.
        validation_fraction: Share of the training documents held out.
        index_cache: Folder of the indices; default: sample_index beside the first dataset.
    """
    data = DataConfig(
        train=train,
        validation=validation,
        validation_fraction=validation_fraction,
        seq_length=seq_length,
        index_cache=index_cache,
    )
    start = time.monotonic()
    held_out = open_shards(validation) if validation else []
    index, validation_index = sample_indices(data, open_shards(train), held_out, _Lines().show)
    print(f"{cache_folder(index_cache, train)}, {time.monotonic() - start:,.1f} s:")
    print(f"  training {describe(index)}")
    if validation_index:
        print(f"  held out {describe(validation_index)}")
    for number, prefix in enumerate(train):
        print(f"  {prefix}: {index.source_bounds[number + 1] - index.source_bounds[number]:,} samples")
    prefixes = " ".join(map(shlex.quote, train))
    command = "torchrun --nproc-per-node 1 pretrain_metro.py --config examples/base.yaml"
    print(f"next:\n  {command} --data.train {prefixes} ...")


def describe(index: SampleIndex) -> str:
    """Samples, tokens and how full rows of one sample each would be."""
    share = index.num_tokens / (len(index) * index.seq_length)
    return f"{len(index):,} samples, {index.num_tokens:,} tokens, {share:.1%} of seq_length on average"


class _Lines:
    """A line now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, samples: int) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{samples:,} samples found", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_tool(main)
