"""Documents to a shard: worker processes parse and encode what one process reads and writes in order.

The bytes written depend on the input and the tokenizer only, not on the number of workers.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metro_megatron.data.documents import MAX_DOCUMENT_BYTES, Record, check_inputs, read_records
from metro_megatron.data.encoding import Chunk, EncodedChunk, encode_all
from metro_megatron.data.progress import ReadingProgress
from metro_megatron.data.shard_writer import ShardWriter
from metro_megatron.data.sources import Source
from metro_megatron.data.tokenizer import Tokenizer
from metro_megatron.errors import UserError

_CHUNK_BYTES = 1 << 20
_EXAMPLES = 5


@dataclass(frozen=True)
class PreprocessOptions:
    """What a shard is made of, and how strictly."""

    inputs: list[str]
    tokenizer: str
    output_prefix: str
    workers: int = 1
    text_key: str = "text"
    strict: bool = False
    max_reject_fraction: float = 0.001
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    overwrite: bool = False


@dataclass
class Summary:
    """What came of a run."""

    manifest: dict[str, Any] = field(default_factory=dict)
    text_bytes: int = 0
    """Bytes of all records, decompressed."""
    rejects: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """Places of the first rejected records."""

    def add(self, chunk: EncodedChunk) -> None:
        self.text_bytes += chunk.text_bytes
        self.rejects.update(str(reason) for _, reason in chunk.rejects)
        room = _EXAMPLES - len(self.examples)
        self.examples += [f"{chunk.path}:{line} {reason}" for line, reason in chunk.rejects[:room]]


def preprocess(options: PreprocessOptions) -> Summary:
    """Write the shard `options.output_prefix`.

    Raises UserError, with nothing written, if an input or the tokenizer cannot be read, the output cannot be
    written, no document is found, or too many records are rejected (any at all if `strict`).
    """
    _check_options(options)
    check_inputs(options.inputs)
    tokenizer = Tokenizer.from_folder(options.tokenizer)
    reader = _Reader(options)
    summary = Summary()
    writer = ShardWriter(options.output_prefix, tokenizer, options.overwrite, reader.share_done)
    with writer, ReadingProgress("preprocessing", reader.total_bytes) as progress:
        for chunk in encode_all(reader.chunks(), tokenizer, options.workers):
            summary.add(chunk)
            if options.strict and summary.examples:
                raise UserError(
                    f"{summary.examples[0]}: rejected, and --strict allows none; repair or remove it"
                )
            writer.append(chunk.tokens, chunk.unit_lengths, chunk.document_units)
            progress.update(reader.position, summary.text_bytes, writer.tokens, summary.rejects.total())
        _check_rejects(summary, writer.documents, options)
        summary.manifest = writer.finish(reader.sources, dict(sorted(summary.rejects.items())))
    return summary


class _Reader:
    """Reads the inputs once, in order, as chunks; knows its place and the finished sources."""

    def __init__(self, options: PreprocessOptions):
        self._options = options
        self._sizes = [os.stat(path).st_size for path in options.inputs]
        self.total_bytes = sum(self._sizes)
        self.position = 0
        self.sources: list[dict[str, Any]] = []

    def share_done(self) -> float:
        return self.position / max(1, self.total_bytes)

    def chunks(self) -> Iterator[Chunk]:
        for path, size in zip(self._options.inputs, self._sizes, strict=True):
            source, start = Source(path), self.position
            records: list[Record] = []
            num_bytes = 0
            for record in read_records(source, self._options.max_document_bytes):
                records.append(record)
                num_bytes += len(record.raw or b"") + 100
                if num_bytes >= _CHUNK_BYTES:
                    self.position = start + source.position
                    yield Chunk(path, self._options.text_key, records)
                    records, num_bytes = [], 0
            if records:
                yield Chunk(path, self._options.text_key, records)
            num_bytes, sha256 = source.finish()
            if num_bytes != size:
                raise UserError(
                    f"{path}: changed from {size:,} to {num_bytes:,} bytes while it was read; run again"
                )
            self.position = start + num_bytes
            self.sources.append({"path": path, "bytes": num_bytes, "sha256": sha256})


def _check_options(options: PreprocessOptions) -> None:
    problems = []
    if options.workers < 1:
        problems.append(f"--workers {options.workers}: at least 1 is needed")
    if not 0 <= options.max_reject_fraction <= 1:
        problems.append(f"--max_reject_fraction {options.max_reject_fraction}: must lie between 0 and 1")
    if options.max_document_bytes < 1:
        problems.append(f"--max_document_bytes {options.max_document_bytes}: must be positive")
    if Path(options.tokenizer).is_file():
        problems.append(f"--tokenizer {options.tokenizer} is a file; name the folder that holds it")
    if problems:
        raise UserError(problems)


def _check_rejects(summary: Summary, documents: int, options: PreprocessOptions) -> None:
    rejected = summary.rejects.total()
    counts = (
        ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.rejects.items())) or "no records"
    )
    first = f"; first: {', '.join(summary.examples)}" if summary.examples else ""
    if not documents:
        raise UserError(
            f"no documents in {', '.join(options.inputs)} ({counts}{first}); check --text_key and the files"
        )
    fraction = rejected / (rejected + documents)
    if fraction > options.max_reject_fraction:
        raise UserError(
            f"{rejected:,} of {rejected + documents:,} records ({fraction:.2%}) rejected: {counts}{first}; "
            f"repair them, or raise --max_reject_fraction ({options.max_reject_fraction})"
        )
