"""Say which documents a step of a run has read, or will read."""

import json
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from metro_megatron.cli.command_line import run_printing_tool, tool_command
from metro_megatron.cli.progress import CountLines
from metro_megatron.errors import UserError
from metro_megatron.inspection.readback import TokenText
from metro_megatron.inspection.step_documents import ReadSample, RunOrder
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.train.journal import PassedOver


@dataclass(frozen=True)
class Options:
    """Of which run, which steps."""

    run: str
    """Run folder (train.output of pretrain_metro.py); its datasets must be where its run_config.yaml says."""
    step: list[int]
    """A step, counted from 1 as metrics.jsonl does, or the first and the last one of several."""
    text: bool = False
    """Print what was read, too."""
    json: bool = False
    """Print a JSON object for each sample instead, a line each."""


def main(options: Options) -> None:
    """Say which documents a step of a run has read, or will read: dataset, source, number, and where in the document.

    Nothing is trained and no batch is made: the order of samples is a function of the seed. Where a step is as many
    samples as fit into train.global_batch_tokens, its first one is counted from the nearest step before it that the run
    has logged or saved. Documents and tokens are numbered from 0. Steps that are passed over, by train.skip_steps or as
    the run went back from them, say so (passed_over in JSON, else null).
    """
    if len(options.step) not in (1, 2):
        raise UserError(f"--step {' '.join(map(str, options.step))}: give one step, or the first and the last one")
    order = RunOrder(Path(options.run))
    text = TokenText(Tokenizer.from_folder(order.tokenizer_folder)) if options.text else None
    lines = CountLines("steps counted up to {:,}")
    passed_over = PassedOver(order.run, order.config)
    samples = order.samples(options.step[0], options.step[-1], lines.show)
    for step, of_step in groupby(samples, lambda sample: sample.step):
        why = passed_over.why(step)
        if options.json:
            for sample in of_step:
                read = {"text": text.plain(sample.ids.tolist())} if text else {}
                print(json.dumps({**sample.record, "passed_over": why or None, **read}))
        else:
            _print_step(step, list(of_step), text, why)
    if options.json:
        return
    print(
        "next, the same with masks and rows:\n"
        f"  {tool_command('inspect_data')} --config {order.config_path} --step {options.step[0]}"
    )


def _print_step(step: int, samples: list[ReadSample], text: TokenText | None, why: str) -> None:
    documents = {(sample.dataset, sample.document) for sample in samples}
    left_out = f"passed over, {why}: " if why else ""
    print(
        f"step {step:,}: {left_out}{len(samples):,} samples of {len(documents):,} documents with "
        f"{sum(sample.tokens for sample in samples):,} tokens"
    )
    for sample in samples:
        origin = f"{sample.source} in {sample.dataset}" if sample.source else sample.dataset
        print(
            f"  {sample.position:,}: document {sample.document:,} of {origin}, tokens "
            f"{sample.first_token:,} to {sample.first_token + sample.tokens - 1:,}, epoch {sample.epoch}"
        )
        if text:
            print(f"    {text.plain(sample.ids.tolist())}")


run = partial(run_printing_tool, main)
"""The console script."""
