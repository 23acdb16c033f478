"""The worker's side: one chunk of input becomes one part in the work folder, read, filtered, encoded and written."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from itertools import chain, compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metro_megatron.data.identity import TextsKey
from metro_megatron.data.shards import token_dtype
from metro_megatron.files import whole_files
from metro_megatron.preprocess.decontamination import EvaluationNgrams
from metro_megatron.preprocess.journal import CONTAMINATED, TOO_SHORT, ChunkEntry, Journal
from metro_megatron.preprocess.parts import HASH_BYTES, PartWriter, part_paths
from metro_megatron.text.documents import ChunkReader, ReadOptions, parse_record
from metro_megatron.text.inputs import Chunk
from metro_megatron.text.records import Record, Reject
from metro_megatron.tokenizer.engines import Engine
from metro_megatron.tokenizer.tokenizer import Tokenizer

NUM_EXAMPLES = 5
_SHOWN_BYTES = 40
_BATCH_CHARACTERS = 1 << 23
"""Encoded at once: engines and n-grams are fast on a megabyte, and a worker's memory stays small."""


@dataclass(frozen=True)
class EncodingOptions:
    """What workers need to know, beside the chunk; picklable."""

    work_folder: Path
    tokenizer: str
    engine: str
    reading: ReadOptions
    min_tokens: int = 1
    has_hashes: bool = False
    """Whether parts hold a hash of every document."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation texts."""


@dataclass(frozen=True)
class WorkDone:
    """How much has been read and encoded."""

    bytes_read: int = 0
    text_bytes: int = 0
    """Of all records, decompressed."""
    tokens: int = 0
    rejected: int = 0

    def __add__(self, other: "WorkDone") -> "WorkDone":
        return WorkDone(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of_entry(cls, entry: ChunkEntry) -> "WorkDone":
        """What the journal says of a finished chunk."""
        return cls(entry.bytes_read, entry.text_bytes, entry.tokens, sum(entry.rejects.values()))


@dataclass
class _Batch:
    documents: list[list[str]] = field(default_factory=list)
    """Units of each."""
    texts: list[str] = field(default_factory=list)
    """Units joined by line ends."""
    characters: int = 0

    def keep(self, is_kept: NDArray[np.bool_]) -> None:
        """Drop the documents that are not kept."""
        self.documents = list(compress(self.documents, is_kept))
        self.texts = list(compress(self.texts, is_kept))


class ChunkEncoder:
    """Encodes chunks; made once per process, as tokenizer and evaluation texts take seconds to load."""

    def __init__(self, options: EncodingOptions):
        self._options = options
        self._engine = Engine.create(options.tokenizer, options.engine)
        self._dtype = token_dtype(Tokenizer.from_folder(options.tokenizer).vocab_size)
        files = options.decontaminate
        self._evaluation = EvaluationNgrams.from_files(list(files)) if files else None

    def encode(self, chunk: Chunk, on_progress: Callable[[WorkDone], object]) -> ChunkEntry:
        """Write the chunk's part and its journal entry, which is returned; `on_progress` hears of every batch.

        Raises UserError if the input cannot be read or has changed, OSError if the work folder cannot be written.
        """
        stem = self._options.work_folder / chunk_name(chunk.number)
        work = _ChunkWork(self._evaluation.num_files if self._evaluation else 0)
        with whole_files(part_paths(stem)) as files:
            writer = PartWriter(files, self._dtype)
            reader = ChunkReader(chunk, self._options.reading)
            for record in reader:
                work.text_bytes += 0 if isinstance(record.raw, Reject) else len(record.raw)
                self._take(record, chunk.file.path, work)
                if work.batch.characters >= _BATCH_CHARACTERS:
                    self._flush(work, writer)
                    on_progress(WorkDone(reader.bytes_read, work.text_bytes, writer.tokens, work.rejects.total()))
            self._flush(work, writer)
        entry = work.entry(writer, reader, self._engine.name)
        Journal(self._options.work_folder).write_entry(f"{stem.name}.json", entry)
        on_progress(WorkDone.of_entry(entry))
        return entry

    def _take(self, record: Record, path: str, work: "_ChunkWork") -> None:
        units = parse_record(record, self._options.reading)
        if isinstance(units, Reject):
            work.reject(f"{path} at {record.position:,}: {units}{_begin(record.raw, units)}", units)
            return
        text = "\n".join(units)
        work.texts.add(text)
        work.batch.documents.append(units)
        work.batch.texts.append(text)
        work.batch.characters += len(text)

    def _flush(self, work: "_ChunkWork", writer: PartWriter) -> None:
        batch, work.batch = work.batch, _Batch()
        if self._evaluation and batch.texts:
            hits = self._evaluation.hits(batch.texts)
            work.hits += hits.sum(axis=0)
            is_clean = hits.sum(axis=1) == 0
            work.dropped[CONTAMINATED] += int((~is_clean).sum())
            batch.keep(is_clean)
        if not batch.documents:
            return
        tokens, lengths = self._engine.encode(list(chain.from_iterable(batch.documents)))
        document_units = np.array(list(map(len, batch.documents)), np.int64)
        is_kept = _document_tokens(lengths, document_units) >= self._options.min_tokens
        if not is_kept.all():
            work.dropped[TOO_SHORT] += int((~is_kept).sum())
            batch.keep(is_kept)
            is_kept_unit = np.repeat(is_kept, document_units)
            tokens = tokens[np.repeat(is_kept_unit, lengths)]
            lengths, document_units = lengths[is_kept_unit], document_units[is_kept]
        hashes = map(_content_hash, batch.texts) if self._options.has_hashes else ()
        writer.append(tokens, lengths, document_units, b"".join(hashes))


class _ChunkWork:
    """What is known of a chunk on the way."""

    def __init__(self, num_evaluation_files: int):
        self.batch = _Batch()
        self.text_bytes = 0
        self.dropped: Counter[str] = Counter()
        self.hits = np.zeros(num_evaluation_files, np.int64)
        """[F] documents that repeat a text of each evaluation file."""
        self.rejects: Counter[str] = Counter()
        self.texts = TextsKey()
        self._examples: list[str] = []

    def reject(self, example: str, reason: Reject) -> None:
        self.rejects[str(reason)] += 1
        if len(self._examples) < NUM_EXAMPLES:
            self._examples.append(example)

    def entry(self, writer: PartWriter, reader: ChunkReader, engine: str) -> ChunkEntry:
        return ChunkEntry(
            documents=writer.documents,
            units=writer.units,
            tokens=writer.tokens,
            text_bytes=self.text_bytes,
            rejects=dict(self.rejects),
            dropped=dict(+self.dropped),
            evaluation_hits=tuple(self.hits.tolist()),
            examples=tuple(self._examples),
            bytes_read=reader.bytes_read,
            sha256=reader.sha256,
            engine=engine,
            checksums=writer.checksums,
            texts=str(self.texts),
        )


encoder_of_process: Callable[[EncodingOptions], ChunkEncoder] = lru_cache(maxsize=1)(ChunkEncoder)
"""The encoder of this process for these options; one at a time, as each has a tokenizer, and every source its own."""


def chunk_name(number: int) -> str:
    """Name of a chunk's part in the work folder."""
    return f"chunk-{number:06d}"


def _begin(raw: bytes | str | Reject, reason: Reject) -> str:
    """How a record begins that is no JSON, which says what it is instead; nothing of others."""
    if reason is not Reject.INVALID_JSON or not isinstance(raw, bytes):
        return ""
    return f" ({ascii(raw[:_SHOWN_BYTES].decode(errors='replace'))}{'...' * (len(raw) > _SHOWN_BYTES)})"


def _content_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def _document_tokens(unit_lengths: NDArray[np.int32], document_units: NDArray[np.int64]) -> NDArray[np.int64]:
    ends = np.concatenate([[0], np.cumsum(unit_lengths, dtype=np.int64)])
    return np.diff(ends[np.concatenate([[0], np.cumsum(document_units)])])
