"""Documents to a tokenizer folder: tokenizer.model, the equal tokenizer.json, tokenizer_config.json, report.json."""

import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from metro_megatron.cli.command_line import run_tool, tool_command
from metro_megatron.cli.options import at_least
from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.errors import UserError
from metro_megatron.text.documents import MAX_DOCUMENT_BYTES, ReadOptions, read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.text.records import Reject
from metro_megatron.tokenizer.report import measure, table, write_report
from metro_megatron.tokenizer.sample import sample_documents
from metro_megatron.tokenizer.tokenizer import TOKENIZER_FILES
from metro_megatron.tokenizer.training import TrainingReport, train_tokenizer


@dataclass(frozen=True)
class Options:
    """Which tokenizer, of what."""

    input: list[str]
    """Files, folders or globs; NAME=PATTERN gives them a source. .jsonl, .txt (.gz, .zst, .bz2), .parquet."""
    output: str
    """Folder to write."""
    vocab_size: Annotated[int, at_least(0)] = 0
    """Number of ids, the 5 specials and 256 bytes included; 0: by the amount of text, 128,000 from 64 MB on."""
    sample_bytes: Annotated[int, at_least(1)] = 1_000_000_000
    """Text to train on in bytes; memory needed is about 6 times that."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Keys of the text in JSON objects; several are joined."""
    max_document_bytes: Annotated[int, at_least(1)] = MAX_DOCUMENT_BYTES
    """Longest record in bytes; longer ones are left out."""
    seed: int = 1
    """Which documents are sampled, if not all."""
    overwrite: bool = False
    """Replace a tokenizer that is there already."""


def main(options: Options) -> None:
    """Train a cased SentencePiece BPE tokenizer with byte fallback on a uniform sample of documents.

    Equal input and options give equal files.
    """
    files = find_inputs(options.input, lambda line: print(line, file=sys.stderr, flush=True))
    output, folder = options.output, Path(os.path.abspath(options.output))
    _refuse_unwritable(folder)
    existing = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if existing and not options.overwrite:
        raise UserError(f"--output {output} holds {existing[0]} already; choose another folder or add --overwrite")
    rejects: Counter[Reject] = Counter()
    reading = ReadOptions(tuple(options.text_key), options.max_document_bytes)
    with ReadingProgress("reading", sum(file.size for file in files)) as progress:
        documents = read_documents(files, rejects, reading, lambda position: progress.update(position, position))
        sample = sample_documents(documents, options.sample_bytes, options.seed)
    print(f"training on {len(sample):,} documents", file=sys.stderr, flush=True)
    report = train_tokenizer([document.units for document in sample], options.vocab_size, folder)
    figures = measure(folder, sample)
    write_report(
        folder,
        figures,
        {
            "vocab_size": report.vocab_size,
            "seed": options.seed,
            "sampled_documents": report.sampled_documents,
            "sampled_bytes": report.sampled_bytes,
            "rejects": dict(sorted(rejects.items())),
        },
    )
    print("\n".join([*describe(report, rejects, output), *table(figures), *next_command(output)]))


def _refuse_unwritable(folder: Path) -> None:
    """Raise UserError where no folder can be written: reading and training may take hours."""
    above = next(path for path in folder.parents if path.exists())
    for path in filter(Path.exists, (folder, above)):
        if not path.is_dir():
            raise UserError(f"--output {folder}: {path} is a file; choose a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--output {folder}: {path} may not be written; choose another, or change its permissions")


def describe(report: TrainingReport, rejects: Counter[Reject], output: str) -> list[str]:
    """What was made of what, a line each."""
    lines = [
        (
            f"{output}: {report.vocab_size:,} ids, trained on {report.sampled_bytes / 1e6:,.1f} MB in "
            f"{report.sampled_documents:,} documents, {report.seconds:,.1f} s"
        ),
        f"  tokenizer.json equals tokenizer.model on {report.checked_bytes / 1e6:,.1f} MB of them",
    ]
    if rejects:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejects.items()))
        lines.append(f"  rejected records: {counts}")
    return lines


def next_command(output: str) -> list[str]:
    """What to run with the tokenizer."""
    return [
        "next:",
        f"  {tool_command('preprocess_data')} --input FILE... --tokenizer {shlex.quote(output)} --output_prefix PREFIX",
    ]


run = partial(run_tool, main)
"""The console script."""
