"""What preprocessing can be told."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from metro_megatron.cli.options import Range, at_least
from metro_megatron.preprocess.journal import PlannedOptions
from metro_megatron.text.documents import CHUNK_BYTES, MAX_DOCUMENT_BYTES

SHARD_BYTES = 4_000_000_000
"""Default limit of a .bin."""


@dataclass(frozen=True)
class PlanOptions:
    """What the bytes of the output depend on, beside inputs and tokenizer."""

    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Keys of the text in JSON objects; several are joined."""
    unit: Literal["line", "sentence", "document"] = "line"
    """What samples are made of whole: lines or sentences without white space around them, or documents as they are."""
    max_document_bytes: Annotated[int, at_least(1)] = MAX_DOCUMENT_BYTES
    """Longest record in bytes; longer ones are rejected."""
    min_tokens: Annotated[int, at_least(1)] = 1
    """Documents with fewer tokens are left out."""
    drop_duplicates: bool = False
    """Leave out documents whose text appeared before."""
    decontaminate: list[str] = field(default_factory=list)
    """Files of evaluation texts; documents that share an n-gram of words with them are left out."""
    chunk_bytes: Annotated[int, at_least(1)] = CHUNK_BYTES
    """Input of one unit of work; large files are cut so."""
    shard_bytes: Annotated[int, at_least(1)] = SHARD_BYTES
    """Largest .bin."""
    shard_index: Annotated[int, at_least(0)] = 0
    """Number of this run among num_shards runs that share the work, for example of a Slurm array."""
    num_shards: Annotated[int, at_least(1)] = 1
    """Number of such runs; tools/merge_shards.py joins what they write."""

    def planned(self, evaluation_hashes: Sequence[str] = ()) -> PlannedOptions:
        """As plans hold them: evaluation files by SHA-256, so that nothing depends on where they lie."""
        values = vars(self) | {"decontaminate": tuple(evaluation_hashes)}
        return PlannedOptions(tuple(values.pop("text_key")), **values)


@dataclass(frozen=True)
class PreprocessOptions:
    """What is done, how, and how strictly."""

    input: list[str]
    """Files, folders or globs; NAME=PATTERN gives them a source. .jsonl, .txt (.gz, .zst, .bz2), .parquet."""
    tokenizer: str
    """Folder written by tools/train_tokenizer.py, or of any tokenizer with a begin, an end, padding and a mask."""
    output_prefix: str
    """Path of the output without its endings; {source} stands for the name of the source."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    workers: Annotated[int, at_least(0)] = 0
    """Processes that read and encode; 0: one for every core."""
    engine: Literal["auto", "gigatoken", "sentencepiece", "tokenizers"] = "auto"
    """What encodes; all give the same ids."""
    engine_cluster: Literal["", "ray"] = ""
    """ray: encode on the Ray cluster of RAY_ADDRESS (extra ray), which shares this file system."""
    strict: bool = False
    """Stop at the first record that gives no document."""
    max_reject_fraction: Annotated[float, Range(0, 1, has_high=True)] = 0.001
    """Share of rejected records above which nothing is finished, in each of --num_shards tasks."""
    overwrite: bool = False
    """Replace what another command has left at the output prefix."""

    @property
    def num_workers(self) -> int:
        """Processes that read and encode."""
        return self.workers or len(os.sched_getaffinity(0))
