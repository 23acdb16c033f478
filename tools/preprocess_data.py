"""Documents to a shard of token ids: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json, PREFIX.tokenizer/."""

import shlex
import time

from metro_megatron.command_line import run_tool
from metro_megatron.data.preprocess import PreprocessOptions, Summary, preprocess


def main(
    input: list[str],
    tokenizer: str,
    output_prefix: str,
    workers: int = 1,
    text_key: str = "text",
    strict: bool = False,
    max_reject_fraction: float = 0.001,
    max_document_bytes: int = 10_000_000,
    overwrite: bool = False,
) -> None:
    """Encode documents and write them as a shard that megatron-core's IndexedDataset can read.

    Every non-empty line of a document becomes one unit, without the white space around it. The output does
    not depend on the number of workers.

    Args:
        input: Files: .jsonl (a JSON object per line) or .txt (blank lines between documents); .gz, .zst too.
        tokenizer: Folder written by tools/train_tokenizer.py.
        output_prefix: Path of the output without its endings, for example data/wikipedia.
        workers: Processes that encode, beside the one that reads and writes; 1: one process does all.
        text_key: Key of the text in JSON objects.
        strict: Stop at the first record that gives no document.
        max_reject_fraction: Share of rejected records above which nothing is written.
        max_document_bytes: Longest record in bytes; longer ones are rejected.
        overwrite: Replace a shard that is there already.
    """
    start = time.monotonic()
    summary = preprocess(
        PreprocessOptions(
            input,
            tokenizer,
            output_prefix,
            workers,
            text_key,
            strict,
            max_reject_fraction,
            max_document_bytes,
            overwrite,
        )
    )
    print(describe(summary, output_prefix, time.monotonic() - start))


def describe(summary: Summary, prefix: str, seconds: float) -> str:
    """The closing summary, ending with the next command."""
    manifest = summary.manifest
    documents, units, tokens = (manifest[key] for key in ("documents", "units", "tokens"))
    rejected = summary.rejects.total()
    lines = [
        (
            f"{prefix}: {documents:,} documents, {units:,} units, {tokens:,} tokens, "
            f"{manifest['files']['bin']['bytes'] / 1e6:,.1f} MB"
        ),
        (
            f"  {tokens / documents:,.1f} tokens per document, {tokens / units:,.1f} per unit, "
            f"{summary.text_bytes / tokens:.2f} input bytes per token"
        ),
        (
            f"  {seconds:,.1f} s: {summary.text_bytes / 1e6 / seconds:,.1f} MB/s, "
            f"{tokens / 1e6 / seconds:,.2f} M tokens/s"
        ),
        f"  rejected: {rejected:,} of {documents + rejected:,} records",
    ]
    lines += [f"    {reason}: {count:,}" for reason, count in sorted(summary.rejects.items())]
    lines += [f"    for example {place}" for place in summary.examples]
    lines += [
        "next:",
        (
            f"  torchrun --nproc-per-node 1 pretrain_metro.py --config examples/base.yaml "
            f"--model.vocab_size {manifest['vocab_size']} --data.train {shlex.quote(prefix)} "
            "--train.output runs/base"
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
