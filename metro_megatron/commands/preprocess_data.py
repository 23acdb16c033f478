"""Documents to datasets of token ids: PREFIX_00000.bin and .idx ..., PREFIX.manifest.json, PREFIX.tokenizer/."""

import shlex
import time
from functools import partial

from metro_megatron.cli.command_line import pretraining_lines, run_tool, tool_command
from metro_megatron.data.identity import repeated_files
from metro_megatron.preprocess.run import PreprocessOptions, Summary, preprocess

_MOST_NAMED = 5
"""Files that repeat others."""


def main(options: PreprocessOptions) -> None:
    """Encode documents and write them as shards that megatron-core's IndexedDataset can read.

    The output does not depend on workers, engine, cluster or interruptions. A run that was stopped, by whatever, goes
    on when the same command is given again; a finished one says so. Exit codes: 0 done, 2 refused or impossible, with
    the reason, 130 Ctrl-C.
    """
    start = time.monotonic()
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
    if not any(source.options.drop_duplicates for source in manifest.sources):
        twice = repeated_files(manifest)
        rows += [("given twice", f"{line} (--drop_duplicates reads one)") for line in twice[:_MOST_NAMED]]
        rows += [("given twice", f"{len(twice) - _MOST_NAMED:,} more files")] if len(twice) > _MOST_NAMED else []
    return "\n".join([f"{summary.prefix}{state}", *(f"  {name:<24} {value}" for name, value in rows)])


def describe_next(summaries: list[Summary]) -> str:
    """The next command."""
    first = summaries[0]
    if first.manifest.num_shards > 1:
        whole = first.prefix.rpartition(".part-")[0]
        parts = f"{shlex.quote(whole)}.part-*.manifest.json"
        options = f"--input {parts} --output_prefix {shlex.quote(whole)}"
        return f"next, after all parts:\n  {tool_command('merge_shards')} {options}"
    documents = sum(summary.manifest.documents for summary in summaries)
    prefixes = [summary.prefix for summary in summaries]
    return "\n".join(pretraining_lines(prefixes, documents))


run = partial(run_tool, main)
"""The console script."""
