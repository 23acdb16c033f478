"""One source on its way to its dataset: chunks to parts by workers, parts to shards, then the manifest.

A run that was interrupted goes on where it was when the same command is given again.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.data.shards import DatasetPaths, read_manifest, token_dtype
from metro_megatron.errors import UserError
from metro_megatron.preprocess.assembly import AssemblyOptions, Statistics, assemble
from metro_megatron.preprocess.cluster import encode_on_ray
from metro_megatron.preprocess.duplicates import find_duplicates
from metro_megatron.preprocess.encoding import DUPLICATE, NUM_EXAMPLES, EncodingOptions, Progress, chunk_name
from metro_megatron.preprocess.journal import Journal
from metro_megatron.preprocess.manifest import (
    RUN_OPTIONS,
    dataset_manifest,
    evaluation_hits,
    file_entries,
    plan_of_manifest,
    source_entry,
)
from metro_megatron.preprocess.options import PlanOptions, PreprocessOptions
from metro_megatron.preprocess.output import (
    MANIFEST,
    differences,
    explained,
    output_prefix,
    publish,
    refuse_foreign,
    refuse_work,
)
from metro_megatron.preprocess.parts import Part, join_hashes, part_paths
from metro_megatron.preprocess.workers import encode_locally
from metro_megatron.text.documents import ReadOptions
from metro_megatron.text.inputs import Chunk, InputFile, find_inputs, plan_chunks
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer


@dataclass
class Summary:
    """What came of a dataset."""

    prefix: str
    manifest: dict[str, Any] = field(default_factory=dict)
    was_finished: bool = False
    """Nothing was left to do."""
    engines: set[str] = field(default_factory=set)
    """What encoded the chunks."""
    text_bytes: int = 0
    """Of all records, decompressed."""
    rejects: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """Places of the first rejected records."""

    def add(self, entry: dict[str, Any]) -> None:
        """Count a finished chunk."""
        self.engines.add(entry["engine"])
        self.text_bytes += entry["text_bytes"]
        self.rejects.update(entry["rejects"])
        self.examples += entry["examples"][: NUM_EXAMPLES - len(self.examples)]


class SourceRun:
    """One source on its way to its dataset."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer, source: str, files: list[InputFile]):
        self._options, self._tokenizer, self._source = options, tokenizer, source
        plan = options.plan
        prefix = output_prefix(options.output_prefix, source)
        if plan.num_shards > 1:
            prefix += f".part-{plan.shard_index:04d}-of-{plan.num_shards:04d}"
        self._paths = DatasetPaths(prefix)
        self._journal = Journal(self._paths.work)
        chunks = plan_chunks(files, plan.chunk_bytes)
        first, last = (len(chunks) * i // plan.num_shards for i in (plan.shard_index, plan.shard_index + 1))
        self._chunks = chunks[first:last]
        self._files = files
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._plan = {
            "tokenizer_sha256": tokenizer.sha256,
            "source": source,
            "options": _plan_entry(plan),
            "files": file_entries(files),
        }

    @property
    def prefix(self) -> str:
        """Of the dataset."""
        return self._paths.prefix

    def check_output(self) -> None:
        """Raise UserError if the output cannot be written or is something else's."""
        if self._is_finished() or self._options.overwrite:
            return
        earlier = self._journal.plan()
        if earlier is None or self._paths.manifest.exists():
            refuse_foreign(self._paths.prefix, self._changes())
        refuse_work(self._paths.work, earlier, self._plan)

    def run(self) -> Summary:
        """Do what is left to do."""
        prefix = self.prefix
        summary = Summary(prefix)
        if self._is_finished():
            shutil.rmtree(self._paths.work, ignore_errors=True)
            return Summary(prefix, read_manifest(prefix), was_finished=True)
        with explained(prefix), self._journal.opened():
            self._journal.begin_or_continue(self._plan)
            copy_tokenizer(self._tokenizer.path, self._paths.work / "tokenizer")
            entries = self._entries(summary)
            self._check_documents(summary, sum(entry["documents"] for entry in entries))
            self._check_rejects(summary, sum(entry["documents"] + sum(entry["dropped"].values()) for entry in entries))
            with explained(prefix, sum(entry["tokens"] for entry in entries) * self._dtype.itemsize):
                if self._journal.entry(MANIFEST) is None:
                    self._journal.write_entry(MANIFEST, self._assemble(entries))
                summary.manifest = publish(self._journal, prefix)
        return summary

    def _is_finished(self) -> bool:
        return self._paths.manifest.exists() and not self._changes()

    def _changes(self) -> list[str]:
        """How the finished dataset at the prefix, if any, differs from what this run would make."""
        if not self._paths.manifest.exists():
            return []
        try:
            manifest = read_manifest(self._paths.prefix)
        except UserError as error:
            return error.problems
        written = self._paths.manifest.stat().st_mtime_ns
        newer = [
            f"{file.path}: changed after the dataset was written" for file in self._files if file.mtime_ns > written
        ]
        return [*differences(plan_of_manifest(manifest), self._plan), *newer]

    def _entries(self, summary: Summary) -> list[dict[str, Any]]:
        """Journal entries of all chunks, after encoding those that lack one."""
        entries = {chunk.number: self._journal.entry(f"{chunk_name(chunk.number)}.json") for chunk in self._chunks}
        missing = [chunk for chunk in self._chunks if entries[chunk.number] is None]
        for entry in filter(None, entries.values()):
            summary.add(entry)
            self._check_strict(entry)
        total = sum(chunk.end - chunk.begin for chunk in missing)

        def take(chunk: Chunk, entry: dict[str, Any]) -> None:
            entries[chunk.number] = entry
            summary.add(entry)
            self._check_strict(entry)

        with ReadingProgress(f"preprocessing {self._source}".strip(), total) as progress:

            def show(now: Progress) -> None:
                progress.update(now.bytes_read, now.text_bytes, now.tokens, now.rejected)

            if missing and self._options.engine_cluster:
                encode_on_ray(missing, self._encoding(), take, show)
            elif missing:
                encode_locally(missing, self._encoding(), min(self._options.num_workers, len(missing)), take, show)
        return [entry for entry in (entries[chunk.number] for chunk in self._chunks) if entry is not None]

    def _encoding(self) -> EncodingOptions:
        plan = self._options.plan
        tokenizer = str((self._paths.work / "tokenizer").absolute())
        return EncodingOptions(
            self._paths.work.absolute(),
            tokenizer,
            self._options.engine,
            ReadOptions(tuple(plan.text_key), plan.max_document_bytes, plan.unit),
            plan.min_tokens,
            plan.drop_duplicates,
            tuple(plan.decontaminate),
        )

    def _assemble(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Shards in the work folder; returns the manifest."""
        plan, work = self._options.plan, self._paths.work
        stems = [work / chunk_name(chunk.number) for chunk in self._chunks]
        parts = [
            Part.of_chunk(stem, self._dtype, entry["documents"], plan.drop_duplicates)
            for stem, entry in zip(stems, entries, strict=True)
        ]
        is_pending = plan.drop_duplicates and plan.num_shards > 1
        duplicates = work / "duplicates" if plan.drop_duplicates and not is_pending else None
        if duplicates and not duplicates.exists():
            find_duplicates(parts, duplicates)

        def drop(number: int) -> None:
            for path in part_paths(stems[number])[:3]:
                path.unlink(missing_ok=True)

        options = AssemblyOptions(self._dtype, plan.shard_bytes, duplicates, drop)
        assembled = assemble(self._journal, parts, [0] * len(parts), options)
        statistics = assembled.sources[0] if assembled.sources else Statistics()
        dropped = Counter({DUPLICATE: sum(map(len, parts)) - statistics.documents})
        for entry in entries:
            dropped.update(entry["dropped"])
        encoded = list(zip(self._chunks, entries, strict=True))
        source = source_entry(self._plan, self._files, encoded, statistics, +dropped)
        source["evaluation_hits"] = evaluation_hits(plan.decontaminate, entries)
        if is_pending:
            join_hashes(parts, work / "hashes")
        head = {
            "tokenizer_sha256": self._tokenizer.sha256,
            "vocab_size": self._tokenizer.vocab_size,
            **{name: getattr(plan, name) for name in RUN_OPTIONS},
            "has_pending_duplicates": is_pending,
        }
        return dataset_manifest(head, [source], assembled.shards)

    def _check_strict(self, entry: dict[str, Any]) -> None:
        if self._options.strict and entry["examples"]:
            raise UserError(f"{entry['examples'][0]}: rejected, and --strict allows none; repair or remove it")

    def _check_documents(self, summary: Summary, documents: int) -> None:
        if not documents and self._options.plan.num_shards == 1:
            raise UserError(
                f"no documents in {', '.join(self._options.input)} ({_describe_rejects(summary)}); "
                "check --text_key and the files"
            )

    def _check_rejects(self, summary: Summary, good: int) -> None:
        rejected = summary.rejects.total()
        fraction = rejected / max(1, rejected + good)
        if fraction > self._options.max_reject_fraction:
            raise UserError(
                f"{rejected:,} of {rejected + good:,} records ({fraction:.2%}) rejected: {_describe_rejects(summary)}; "
                f"repair them, or raise --max_reject_fraction ({self._options.max_reject_fraction})"
            )


def _describe_rejects(summary: Summary) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.rejects.items())) or "no records"
    return f"{counts}; first: {', '.join(summary.examples)}" if summary.examples else counts


def _plan_entry(plan: PlanOptions) -> dict[str, Any]:
    """Options as plans and manifests hold them."""
    values = asdict(plan)
    return {"text_keys": values.pop("text_key"), **values, "decontaminate": _contents(plan.decontaminate)}


def _contents(paths: Sequence[str]) -> list[str]:
    """SHA-256 of evaluation files, so that a plan does not depend on where they lie."""
    files = find_inputs(paths) if paths else []
    return [hashlib.sha256(Path(file.path).read_bytes()).hexdigest() for file in files]
