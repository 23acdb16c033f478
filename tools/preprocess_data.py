"""Documents to datasets of token ids: PREFIX_00000.bin and .idx ..., PREFIX.manifest.json, PREFIX.tokenizer/."""

import os
import shlex
import time
from typing import Literal

from metro_megatron.cli.command_line import run_tool
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, Summary, preprocess
from metro_megatron.text.documents import CHUNK_BYTES


def main(
    input: list[str],
    tokenizer: str,
    output_prefix: str,
    workers: int = 0,
    text_key: list[str] = ["text"],  # noqa: B006 - read only; the command line shows it
    unit: Literal["line", "sentence"] = "line",
    min_tokens: int = 1,
    drop_duplicates: bool = False,
    decontaminate: list[str] = [],  # noqa: B006
    engine: Literal["auto", "gigatoken", "sentencepiece"] = "auto",
    engine_cluster: Literal["", "ray"] = "",
    strict: bool = False,
    max_reject_fraction: float = 0.001,
    max_document_bytes: int = 10_000_000,
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = 4_000_000_000,
    shard_index: int = 0,
    num_shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Encode documents and write them as shards that megatron-core's IndexedDataset can read.

    The output does not depend on workers, engine, cluster or interruptions. A run that was stopped, by whatever, goes
    on when the same command is given again; a finished one says so. Exit codes: 0 done, 2 refused or impossible, with
    the reason, 130 Ctrl-C.

    Args:
        input: Files, folders or globs; NAME=PATTERN gives them a source. .jsonl, .txt (.gz, .zst, .bz2), .parquet.
        tokenizer: Folder written by tools/train_tokenizer.py.
        output_prefix: Path of the output without its endings; {source} stands for the name of the source.
        workers: Processes that read and encode; 0: one for every core.
        text_key: Keys of the text in JSON objects; several are joined.
        unit: What samples are made of whole: lines or sentences.
        min_tokens: Documents with fewer tokens are left out.
        drop_duplicates: Leave out documents whose text appeared before.
        decontaminate: Files of evaluation texts; documents that share an n-gram of words with them are left out.
        engine: What encodes; all give the same ids.
        engine_cluster: ray: encode on the Ray cluster of RAY_ADDRESS (extra ray), which shares this file system.
        strict: Stop at the first record that gives no document.
        max_reject_fraction: Share of rejected records above which nothing is finished, in each of --num_shards tasks.
        max_document_bytes: Longest record in bytes; longer ones are rejected.
        chunk_bytes: Input of one unit of work; large files are cut so.
        shard_bytes: Largest .bin.
        shard_index: Number of this run among num_shards runs that share the work, for example of a Slurm array.
        num_shards: Number of such runs; tools/merge_shards.py joins what they write.
        overwrite: Replace what another command has left at the output prefix.
    """
    start = time.monotonic()
    plan = PlanOptions(
        tuple(text_key),
        unit,
        max_document_bytes,
        min_tokens,
        drop_duplicates,
        tuple(decontaminate),
        chunk_bytes,
        shard_bytes,
        shard_index,
        num_shards,
    )
    options = PreprocessOptions(
        input,
        tokenizer,
        output_prefix,
        plan,
        workers or len(os.sched_getaffinity(0)),
        engine,
        engine_cluster,
        strict,
        max_reject_fraction,
        overwrite,
    )
    summaries = preprocess(options)
    seconds = time.monotonic() - start
    print(*(describe(summary, seconds) for summary in summaries), describe_next(summaries), sep="\n")


def describe(summary: Summary, seconds: float) -> str:
    """What a dataset holds and what was left out."""
    manifest = summary.manifest
    documents, units, tokens = manifest.documents, manifest.units, manifest.tokens
    size = sum(shard.bin.bytes for shard in manifest.shards)
    state = " (was finished already)" if summary.was_finished else ""
    rows = [
        ("shards", f"{len(manifest.shards):,}, {size / 1e6:,.1f} MB"),
        ("documents", f"{documents:,}"),
        ("units", f"{units:,}, {tokens / max(1, units):,.1f} tokens each"),
        ("tokens", f"{tokens:,}, {tokens / max(1, documents):,.1f} per document"),
    ]
    if not summary.was_finished:
        rate = f"{summary.text_bytes / 1e6:,.1f} MB of text in {seconds:,.1f} s"
        rows.append(("engine", ", ".join(sorted(summary.engines))))
        rows.append(("input", f"{rate}: {summary.text_bytes / 1e6 / seconds:,.1f} MB/s"))
    rows += [(f"rejected, {reason}", f"{count:,}") for reason, count in manifest.rejects.items()]
    rows += [(f"left out, {reason}", f"{count:,}") for reason, count in manifest.dropped.items()]
    hits = manifest.sources[0].evaluation_hits
    rows += [(f"  repeat {name}", f"{count:,}") for name, count in hits.items()]
    rows += [("  for example", example) for example in summary.examples]
    return "\n".join([f"{summary.prefix}{state}", *(f"  {name:<24} {value}" for name, value in rows)])


def describe_next(summaries: list[Summary]) -> str:
    """The next command."""
    first = summaries[0]
    if first.manifest.num_shards > 1:
        whole = first.prefix.rpartition(".part-")[0]
        parts = f"{shlex.quote(whole)}.part-*.manifest.json"
        options = f"--input {parts} --output_prefix {shlex.quote(whole)}"
        return f"next, after all parts:\n  python tools/merge_shards.py {options}"
    prefixes = " ".join(shlex.quote(summary.prefix) for summary in summaries)
    return (
        "next:\n  torchrun --nproc-per-node 1 pretrain_metro.py --config examples/base.yaml "
        f"--model.vocab_size {first.manifest.vocab_size} --data.train {prefixes} --train.output runs/base"
    )


if __name__ == "__main__":
    run_tool(main)
