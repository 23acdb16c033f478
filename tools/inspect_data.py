"""Look into datasets: statistics, documents, samples and batches as text, and whether every byte is as it should."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.config.file import parse_config
from metro_megatron.data.manifest import read_manifest
from metro_megatron.errors import UserError
from metro_megatron.inspection.documents import all_sources, describe, source_lengths
from metro_megatron.inspection.length_picture import draw
from metro_megatron.inspection.readback import DatasetReader, TokenText, describe_step
from metro_megatron.inspection.verification import Verified, dataset_bytes, verify
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.vocabulary import NUM_SPECIALS

_SECONDS_BETWEEN_LINES = 10.0


def main(
    dataset: list[str] = [],  # noqa: B006 - read only; the command line shows it
    picture: str = "",
    documents: int = 0,
    samples: int = 0,
    shuffle_seed: int = 0,
    seq_length: int = 512,
    step: int = 0,
    config: list[str] = [],  # noqa: B006
    verify: bool = False,
) -> None:
    """Show what datasets hold: by default counts, histograms of lengths and padding, by source.

    In samples, tokens in brackets are masked: `a long [ film]`. Exit codes: 0 done and nothing damaged, 2 refused or
    damaged, with every reason, 130 Ctrl-C.

    Args:
        dataset: Prefixes written by tools/preprocess_data.py.
        picture: Draw lengths and padding into this .png, .svg or .pdf (needs matplotlib, extra demo).
        documents: Print so many documents, a line for each unit.
        samples: Print so many samples; with --step at most so many, 0 all of them.
        shuffle_seed: Choose documents, and a sample of each, at random by this seed; 0: the first.
        seq_length: Longest sample in tokens, <s> and </s> included.
        step: Print the samples of this step of a run, counted from 1 as metrics.jsonl does; asks for --config.
        config: run_config.yaml of a run, or what pretrain_metro.py OPTIONS --print_config prints; a later file
            overrides an earlier one.
        verify: Read everything and compare sizes, hashes, indices, ids, counts and tokenizer with the manifest.
    """
    _refuse(dataset, step, config, {"documents": documents, "samples": samples, "step": step})
    if verify:
        _verify(dataset)
    if documents or (samples and not step):
        for prefix in dataset:
            reader = DatasetReader(prefix)
            _print(reader[number].describe(reader.text) for number in reader.numbers(documents, shuffle_seed))
            _print(reader.samples(samples, seq_length, shuffle_seed) if samples else iter(()))
    if step:
        _show_step(config, step, samples)
    if picture or not (verify or documents or samples or step):
        _show_statistics(dataset, picture)


def _refuse(dataset: list[str], step: int, config: list[str], counts: dict[str, int]) -> None:
    problems = [f"--{name} {count}: must not be negative" for name, count in counts.items() if count < 0]
    if step > 0 and not config:
        problems.append(f"--step {step}: needs --config, the run_config.yaml of the run")
    if config and not step:
        problems.append("--config: is read for --step; give the number of a step")
    if not dataset and not step:
        problems.append("--dataset: needed for all but --step; name prefixes written by tools/preprocess_data.py")
    if problems:
        raise UserError(problems)


@contextmanager
def _reading(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Progress as a function that hears of bytes that were read."""
    position = 0
    with ReadingProgress(title, total_bytes) as progress:

        def on_bytes(size: int) -> None:
            nonlocal position
            position += size
            progress.update(position, position)

        yield on_bytes


def _verify(prefixes: list[str]) -> None:
    problems = []
    for prefix in prefixes:
        start = time.monotonic()
        try:
            with _reading(f"{prefix}: verifying", dataset_bytes(read_manifest(prefix))) as on_bytes:
                verified = verify(prefix, on_bytes)
        except UserError as error:
            problems += error.problems
        else:
            print(_describe(prefix, verified, time.monotonic() - start))
    if problems:
        raise UserError(problems)


def _describe(prefix: str, verified: Verified, seconds: float) -> str:
    manifest, size = verified.manifest, verified.num_bytes
    counts = ", ".join(f"{getattr(manifest, name):,} {name}" for name in ("documents", "units", "tokens"))
    rows = [
        ("files", f"{verified.num_files:,}, {size / 1e6:,.1f} MB, have the manifest's sizes and SHA-256"),
        ("indices", "are well formed and speak of the ids that are there"),
        ("ids", f"lie in {NUM_SPECIALS} to {manifest.vocab_size - 1:,}: no specials"),
        ("counts and histograms", f"add up over shards and sources: {counts}"),
        ("tokenizer", f"is {manifest.tokenizer_sha256[:12]}"),
        ("read", f"in {seconds:,.1f} s: {size / 1e6 / seconds:,.1f} MB/s"),
    ]
    return "\n".join([f"{prefix} is whole", *(f"  {name:<24} {value}" for name, value in rows)])


def _print(texts: Iterator[str]) -> None:
    for text in texts:
        print(text, end="\n\n")


def _show_statistics(prefixes: list[str], picture: str) -> None:
    found = []
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        with _reading(f"{prefix}: cutting samples", sum(shard.bin.bytes for shard in manifest.shards)) as on_bytes:
            sources = source_lengths(prefix, on_bytes)
        print(f"{prefix}: {len(manifest.shards):,} shards, {dataset_bytes(manifest) / 1e6:,.1f} MB\n")
        _print(map(describe, [*sources, all_sources(sources)] if len(sources) > 1 else sources))
        found += sources
    if picture:
        draw(found, Path(picture))
        print(f"made {picture}")
    print(f"next, to read every byte:\n  python tools/inspect_data.py --dataset {shlex.join(prefixes)} --verify")


def _show_step(config: list[str], step: int, samples: int) -> None:
    from metro_megatron.train.launch import import_megatron

    import_megatron()
    from metro_megatron.train.past_step import past_step

    batch, corpus = past_step(parse_config(["--config", *config]), step, _Lines(f"steps before {step:,}").show)
    text = TokenText(Tokenizer.from_folder(corpus.tokenizer_folder))
    texts = describe_step(batch, corpus.train_index, corpus.train_shards, text)
    print(f"step {step}: {next(texts)}\n")
    _print(islice(texts, samples or None))


class _Lines:
    """A line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = time.monotonic()

    def show(self, done: int) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._what}: made {done:,}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what is printed may go to head or less
    run_tool(main)
