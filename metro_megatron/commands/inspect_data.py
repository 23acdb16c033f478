"""Look into datasets: statistics, documents, samples and batches as text, and whether every byte is as it should."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import run_printing_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.picture import refuse_picture
from metro_megatron.cli.progress import CountLines, ReadingProgress
from metro_megatron.config.file import parse_config
from metro_megatron.data.manifest import Manifest, read_manifest
from metro_megatron.data.vocabulary import with_vocabulary
from metro_megatron.errors import UserError
from metro_megatron.inspection.checksums import add_checksums
from metro_megatron.inspection.documents import all_sources, describe, source_lengths
from metro_megatron.inspection.length_picture import draw
from metro_megatron.inspection.readback import DatasetReader, TokenText, describe_step
from metro_megatron.inspection.verification import Verified, dataset_bytes, verify
from metro_megatron.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """What to show."""

    dataset: list[str] = field(default_factory=list)
    """Prefixes written by tools/preprocess_data.py."""
    picture: str = ""
    """Draw lengths and padding into this .png, .svg or .pdf (needs matplotlib, extra demo)."""
    documents: Annotated[int, at_least(0)] = 0
    """Print so many documents, a line for each unit."""
    samples: Annotated[int, at_least(0)] = 0
    """Print so many samples; with --step at most so many, 0 all of them."""
    shuffle_seed: int = 0
    """Choose documents, and a sample of each, at random by this seed; 0: the first."""
    seq_length: int = 512
    """Longest sample in tokens, <s> and </s> included."""
    step: Annotated[int, at_least(0)] = 0
    """Print the samples of this step of a run, counted from 1 as metrics.jsonl does; asks for --config."""
    config: list[str] = field(default_factory=list)
    """run_config.yaml of a run, or what pretrain_metro.py OPTIONS --print_config prints; a later file overrides an
    earlier one."""
    verify: bool = False
    """Read everything and compare sizes, hashes, indices, checksums, ids, counts and tokenizer with the manifest; look
    at the sample indices beside it, and at the journal of an unfinished run."""
    add_checksums: bool = False
    """Write the checksums of blocks (4 bytes for 16 KiB of ids) that a dataset of an earlier version lacks, by which
    training notices damage; its ids are compared with the manifest before."""


def main(options: Options) -> None:
    """Show what datasets hold: by default counts, histograms of lengths and padding, by source.

    In samples, tokens in brackets are masked: `a long [ film]`. Exit codes: 0 done and nothing damaged, 2 refused or
    damaged, with every reason, 130 Ctrl-C.
    """
    _refuse(options)
    documents, samples, step = options.documents, options.samples, options.step
    if options.add_checksums:
        _add_checksums(options.dataset)
    if options.verify:
        _verify(options.dataset)
    if documents or (samples and not step):
        for prefix in options.dataset:
            reader, seed = DatasetReader(prefix), options.shuffle_seed
            _print(reader[number].describe(reader.text) for number in reader.numbers(documents, seed))
            _print(reader.samples(samples, options.seq_length, seed) if samples else iter(()))
    if step:
        _show_step(options.config, step, samples)
    if options.picture or not (options.verify or options.add_checksums or documents or samples or step):
        _show_statistics(options.dataset, options.picture)


def _refuse(options: Options) -> None:
    problems = []
    if options.step and not options.config:
        problems.append(f"--step {options.step}: needs --config, the run_config.yaml of the run")
    if options.config and not options.step:
        problems.append("--config: is read for --step; give the number of a step")
    if not options.dataset and not options.step:
        problems.append("--dataset: needed for all but --step; name prefixes written by tools/preprocess_data.py")
    if problems:
        raise UserError(problems)
    if options.picture:
        refuse_picture(Path(options.picture))


def _add_checksums(prefixes: list[str]) -> None:
    for prefix in prefixes:
        size = sum(shard.bin.bytes for shard in read_manifest(prefix).shards)
        with ReadingProgress(f"{prefix}: adding checksums", size) as progress:
            manifest = add_checksums(prefix, progress.advance)
        print(f"{prefix}: {len(manifest.shards):,} shards have checksums for {size / 1e6:,.1f} MB of ids")
    print(f"next, to compare all the rest:\n  {tool_command('inspect_data')} --dataset {shlex.join(prefixes)} --verify")


def _verify(prefixes: list[str]) -> None:
    problems = []
    for prefix in prefixes:
        start = time.monotonic()
        try:
            with ReadingProgress(f"{prefix}: verifying", dataset_bytes(read_manifest(prefix))) as progress:
                verified = verify(prefix, progress.advance)
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
        ("ids", f"lie below {manifest.vocab_size:,}: none that begins, ends, pads or masks"),
        ("counts and histograms", f"add up over shards and sources: {counts}"),
        ("inputs", _read_inputs(manifest)),
        ("blocks", _checksums(manifest)),
        ("tokenizer", f"is {manifest.tokenizer_sha256[:12]}"),
        ("read", f"in {seconds:,.1f} s: {size / 1e6 / seconds:,.1f} MB/s"),
    ]
    return "\n".join([f"{prefix} is whole", *(f"  {name:<24} {value}" for name, value in rows)])


def _checksums(manifest: Manifest) -> str:
    if all(shard.crc for shard in manifest.shards):
        return "have checksums, with which training compares them"
    return "have no checksums; --add_checksums writes them"


def _read_inputs(manifest: Manifest) -> str:
    if manifest.num_shards > 1:
        task = f"task {manifest.shard_index} of {manifest.num_shards} has its part"
        return f"{task}; join all with {tool_command('merge_shards')}"
    return f"{sum(len(source.files) for source in manifest.sources):,} files were read to the end"


def _print(texts: Iterator[str]) -> None:
    for text in texts:
        print(text, end="\n\n")


def _show_statistics(prefixes: list[str], picture: str) -> None:
    found = []
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        total = sum(shard.bin.bytes for shard in manifest.shards)
        with ReadingProgress(f"{prefix}: cutting samples", total) as progress:
            sources = source_lengths(prefix, progress.advance)
        print(f"{prefix}: {len(manifest.shards):,} shards, {dataset_bytes(manifest) / 1e6:,.1f} MB\n")
        _print(map(describe, [*sources, all_sources(sources)] if len(sources) > 1 else sources))
        found += sources
    if picture:
        draw(found, Path(picture))
        print(f"made {picture}")
    print(f"next, to read every byte:\n  {tool_command('inspect_data')} --dataset {shlex.join(prefixes)} --verify")


def _show_step(config: list[str], step: int, samples: int) -> None:
    from metro_megatron.train.launch import import_megatron

    import_megatron()
    from metro_megatron.train.past_step import past_step

    lines = CountLines(f"steps before {step:,}: made {{:,}}")
    batch, corpus, why = past_step(with_vocabulary(parse_config(["--config", *config])), step, lines.show)
    text = TokenText(Tokenizer.from_folder(corpus.tokenizer_folder))
    texts = describe_step(batch, corpus.index_at(step - 1), corpus.train_shards, text)
    print(f"step {step}: {f'passed over, {why}: ' if why else ''}{next(texts)}\n")
    _print(islice(texts, samples or None))


run = partial(run_printing_tool, main)
"""The console script."""
