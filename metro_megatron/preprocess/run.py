"""Documents to datasets of token ids: chunks to parts by workers, parts to shards, then the manifest.

The bytes written depend on inputs, tokenizer and `PlanOptions` only. A run that was interrupted goes on where it was
when the same command is given again.
"""

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from metro_megatron.cli.options import flatten, options_of, out_of_range
from metro_megatron.cli.progress import ReadingProgress
from metro_megatron.data.file_hashes import file_entry
from metro_megatron.data.manifest import NO_DOCUMENTS, DatasetPaths, FileEntry, Manifest, read_manifest
from metro_megatron.data.shards import token_dtype
from metro_megatron.errors import UserError
from metro_megatron.preprocess.assembly import (
    Assembled,
    AssemblyOptions,
    assemble,
    find_duplicates,
    first_needed_part,
)
from metro_megatron.preprocess.encoding import NUM_EXAMPLES, EncodingOptions, WorkDone, chunk_name
from metro_megatron.preprocess.journal import ChunkEntry, Journal, Plan, PlannedFile
from metro_megatron.preprocess.options import PlanOptions, PreprocessOptions
from metro_megatron.preprocess.output import (
    MANIFEST,
    dataset_manifest,
    differences,
    explained,
    output_prefix,
    part_prefix,
    plan_of_manifest,
    planned_files,
    publish,
    refuse_foreign,
    refuse_work,
    source_entry,
)
from metro_megatron.preprocess.parts import SECTIONS, Part, damaged_section, join_hashes, part_paths
from metro_megatron.preprocess.rewritten import Piece, pieces_of, rewritten
from metro_megatron.preprocess.workers import encode_locally, encode_on_ray
from metro_megatron.text.documents import ReadOptions
from metro_megatron.text.inputs import Chunk, InputFile, find_inputs, plan_chunks
from metro_megatron.tokenizer.tokenizer import Tokenizer, copy_tokenizer

_CLOCKS_AGREE_NS = 24 * 3600 * 10**9
"""A file that is older than a dataset by so much was not written after it, whoever's clocks say so."""

__all__ = ["PlanOptions", "PreprocessOptions", "Summary", "preprocess"]


@dataclass(frozen=True)
class Summary:
    """What came of a dataset."""

    prefix: str
    manifest: Manifest
    was_finished: bool = False
    """Nothing was left to do."""
    engines: frozenset[str] = frozenset()
    """What encoded the chunks."""
    text_bytes: int = 0
    """Of all records, decompressed."""
    examples: tuple[str, ...] = ()
    """Where the first rejected records are."""


def preprocess(options: PreprocessOptions) -> list[Summary]:
    """Write a dataset for every source of the inputs.

    Raises UserError if an input or the tokenizer cannot be read, the output cannot be written, no document is found, or
    too many records are rejected (any at all if `strict`); what was encoded stays in the work folder.
    """
    _check_options(options)
    by_source: dict[str, list[InputFile]] = {}
    for file in find_inputs(options.input, lambda line: print(line, file=sys.stderr, flush=True)):
        by_source.setdefault(file.source, []).append(file)
    if len(by_source) > 1 and "{source}" not in options.output_prefix:
        raise UserError(
            f"--output_prefix {options.output_prefix}: there are {len(by_source)} sources ({', '.join(by_source)}); "
            "write {source} where their names belong"
        )
    tokenizer = Tokenizer.from_folder(options.tokenizer)
    runs = [SourceRun(options, tokenizer, source, files) for source, files in by_source.items()]
    for run in runs:
        with explained(run.prefix):
            run.check_output()
    return [run.run() for run in runs]


class SourceRun:
    """One source on its way to its dataset; `run` is the way, step by step."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer, source: str, files: list[InputFile]):
        self._options, self._tokenizer, self._source, self._files = options, tokenizer, source, files
        plan = options.plan
        prefix = output_prefix(options.output_prefix, source)
        if plan.num_shards > 1:
            prefix = part_prefix(prefix, plan.shard_index, plan.num_shards)
        self.prefix = prefix
        """Of the dataset."""
        self._paths = DatasetPaths(prefix)
        self._journal = Journal(self._paths.work)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._evaluation_files = find_inputs(plan.decontaminate) if plan.decontaminate else []
        chunks = plan_chunks(files, plan.chunk_bytes)
        first, last = (len(chunks) * index // plan.num_shards for index in (plan.shard_index, plan.shard_index + 1))
        self._chunks = chunks[first:last]

    def check_output(self) -> None:
        """Raise UserError if the output cannot be written or is something else's."""
        if self._is_finished() or self._options.overwrite:
            return
        earlier = self._journal.plan()
        if earlier is None or self._paths.manifest.exists():
            refuse_foreign(self.prefix, self._changes())
        refuse_work(self._paths.work, earlier, self._plan)
        self._refuse_stale(self._stale_chunks)

    def run(self) -> Summary:
        """Do what is left to do: every step leaves an entry in the journal, and is not done again where one is."""
        if self._is_finished():
            shutil.rmtree(self._paths.work, ignore_errors=True)
            return Summary(self.prefix, read_manifest(self.prefix), was_finished=True)
        with explained(self.prefix), self._journal.opened():
            self._journal.begin_or_continue(self._plan, anew=bool(self._stale_chunks))
            copy_tokenizer(self._tokenizer.path, self._paths.work / "tokenizer")
            entries = self._encode_chunks()
            self._check_unchanged(entries)
            self._check_rejects(entries)
            with explained(self.prefix, sum(entry.tokens for entry in entries) * self._dtype.itemsize):
                if self._journal.entry(MANIFEST, Manifest) is None:
                    parts = self._parts(entries)
                    assembled = self._assemble(parts, self._find_duplicates(parts))
                    hashes = self._join_hashes(parts)
                    manifest = replace(self._manifest(entries, assembled), hashes=hashes)
                    self._journal.write_entry(MANIFEST, manifest)
                manifest = publish(self._journal, self.prefix)
        return Summary(
            self.prefix,
            manifest,
            engines=frozenset(entry.engine for entry in entries),
            text_bytes=sum(entry.text_bytes for entry in entries),
            examples=_examples(entries),
        )

    @cached_property
    def _plan(self) -> Plan:
        # Evaluation files by content, so that a plan does not depend on where they lie.
        contents = (Path(file.path).read_bytes() for file in self._evaluation_files)
        options = self._options.plan.planned([hashlib.sha256(content).hexdigest() for content in contents])
        return Plan(self._tokenizer.sha256, self._source, options, planned_files(self._files))

    def _is_finished(self) -> bool:
        return self._paths.manifest.exists() and not self._changes()

    def _changes(self) -> list[str]:
        """How the finished dataset at the prefix, if any, differs from what this run would make."""
        if not self._paths.manifest.exists():
            return []
        try:
            earlier = plan_of_manifest(read_manifest(self.prefix))
        except UserError as error:
            return error.problems
        return differences(earlier, self._plan.content) or self._rewritten_since

    @cached_property
    def _rewritten_since(self) -> list[str]:
        """Files whose bytes are not those that the finished dataset was made of."""
        trusted = self._paths.manifest.stat().st_mtime_ns - _CLOCKS_AGREE_NS
        entries = read_manifest(self.prefix).sources[0].files
        pieces: list[Piece] = []
        for file, planned, entry in zip(self._files, self._plan.files, entries, strict=True):
            if max(planned.mtime_ns, planned.ctime_ns) > trusted:
                pieces += pieces_of(file, entry.pieces)
        return rewritten(pieces) if pieces else []

    @cached_property
    def _stale_chunks(self) -> list[str]:
        """Files whose bytes are not those that finished chunks of an interrupted run were made of."""
        earlier = self._journal.plan()
        if not isinstance(earlier, Plan) or earlier.content != self._plan.content:
            return []
        entries = (self._journal.entry(f"{chunk_name(chunk.number)}.json", ChunkEntry) for chunk in self._chunks)
        return self._rewritten(earlier.files, self._plan.files, entries)

    def _check_unchanged(self, entries: Sequence[ChunkEntry]) -> None:
        """Raise UserError if a file that was touched while it was read has other bytes now."""
        self._refuse_stale(self._rewritten(self._plan.files, planned_files(self._files), entries))

    def _rewritten(
        self, earlier: Sequence[PlannedFile], now: Sequence[PlannedFile], entries: Iterable[ChunkEntry | None]
    ) -> list[str]:
        """A line for each file that is not as it was earlier, times included, and of which a chunk has other bytes."""
        known = set(earlier)
        touched = {file.path for file, one in zip(self._files, now, strict=True) if one not in known}
        pieces = [
            Piece(chunk.file, chunk.begin, chunk.end, entry.sha256)
            for chunk, entry in zip(self._chunks, entries, strict=True)
            if entry and chunk.file.path in touched
        ]
        return rewritten(pieces) if pieces else []

    def _refuse_stale(self, lines: Sequence[str]) -> None:
        if lines:
            advice = f"{self._paths.work} holds what was made of other bytes; start again with --overwrite"
            raise UserError([*lines, advice])

    def _encode_chunks(self) -> list[ChunkEntry]:
        """Make a part of every chunk that has none; journal entries of all chunks, in order."""
        entries: dict[int, ChunkEntry] = {}

        def take(chunk: Chunk, entry: ChunkEntry) -> None:
            entries[chunk.number] = entry
            self._check_strict(entry)

        for chunk, entry in self._finished_chunks():
            take(chunk, entry)
        missing = [chunk for chunk in self._chunks if chunk.number not in entries]
        total = sum(chunk.end - chunk.begin for chunk in missing)
        with ReadingProgress(f"preprocessing {self._source}".strip(), total) as progress:

            def show(now: WorkDone) -> None:
                progress.update(now.bytes_read, now.text_bytes, now.tokens, now.rejected)

            if missing and self._options.engine_cluster:
                encode_on_ray(missing, self._encoding(), take, show)
            elif missing:
                encode_locally(missing, self._encoding(), min(self._options.num_workers, len(missing)), take, show)
        return [entries[chunk.number] for chunk in self._chunks]

    def _finished_chunks(self) -> Iterator[tuple[Chunk, ChunkEntry]]:
        """Chunks of which an earlier call has left a part that is whole, as far as it is read again."""
        is_assembled = self._journal.entry(MANIFEST, Manifest) is not None
        first_needed = first_needed_part(self._journal)
        for number, chunk in enumerate(self._chunks):
            if entry := self._journal.entry(f"{chunk_name(chunk.number)}.json", ChunkEntry):
                first = SECTIONS.index("hashes") if number < first_needed else 0
                damaged = None if is_assembled else damaged_section(self._stem(chunk), entry.checksums, first)
                if damaged:
                    print(f"{damaged}: damaged; {chunk.file.path} is encoded again", file=sys.stderr, flush=True)
                else:
                    yield chunk, entry

    def _encoding(self) -> EncodingOptions:
        plan, work = self._options.plan, self._paths.work.absolute()
        return EncodingOptions(
            work,
            str(work / "tokenizer"),
            self._options.engine,
            ReadOptions(tuple(plan.text_key), plan.max_document_bytes, plan.unit),
            plan.min_tokens,
            plan.drop_duplicates,
            tuple(plan.decontaminate),
        )

    def _parts(self, entries: Sequence[ChunkEntry]) -> list[Part]:
        has_hashes = self._options.plan.drop_duplicates
        return [
            Part.of_chunk(self._stem(chunk), self._dtype, entry.documents, has_hashes)
            for chunk, entry in zip(self._chunks, entries, strict=True)
        ]

    def _stem(self, chunk: Chunk) -> Path:
        """Path of a chunk's part without the endings of its files."""
        return self._paths.work / chunk_name(chunk.number)

    def _find_duplicates(self, parts: Sequence[Part]) -> Path | None:
        plan = self._plan.options
        if not plan.drop_duplicates or plan.has_pending_duplicates:
            return None
        path = self._paths.work / "duplicates"
        find_duplicates(parts, path)
        return path

    def _assemble(self, parts: Sequence[Part], duplicates: Path | None) -> Assembled:
        """Shards in the work folder; of parts that they hold only the hashes stay."""

        def drop(number: int) -> None:
            tokens, units, documents, _ = part_paths(self._stem(self._chunks[number]))
            for path in (tokens, units, documents):
                path.unlink(missing_ok=True)

        options = AssemblyOptions(self._dtype, self._options.plan.shard_bytes, duplicates, drop)
        return assemble(self._journal, parts, [0] * len(parts), options)

    def _join_hashes(self, parts: Sequence[Part]) -> FileEntry | None:
        """Leave the hashes of all documents for the merge that drops duplicates."""
        if not self._plan.options.has_pending_duplicates:
            return None
        path = self._paths.work / "hashes"
        join_hashes(parts, path)
        return file_entry(path)

    def _manifest(self, entries: Sequence[ChunkEntry], assembled: Assembled) -> Manifest:
        statistics = assembled.sources[0] if assembled.sources else NO_DOCUMENTS
        encoded = list(zip(self._chunks, entries, strict=True))
        source = source_entry(self._plan, self._files, encoded, statistics, self._evaluation_files)
        tokenizer, options = self._tokenizer, self._plan.options
        facts = (tokenizer.sha256, tokenizer.vocab_size, options, [source], assembled.shards)
        return dataset_manifest(*facts, tokenizer.special_ids)

    def _check_strict(self, entry: ChunkEntry) -> None:
        if self._options.strict and entry.examples:
            raise UserError(f"{entry.examples[0]}: rejected, and --strict allows none; repair or remove it")

    def _check_rejects(self, entries: Sequence[ChunkEntry]) -> None:
        """Raise UserError if there is no document, or too many records gave none."""
        documents = sum(entry.documents for entry in entries)
        if not documents and self._options.plan.num_shards == 1:
            raise UserError(
                f"no documents in {', '.join(self._options.input)} ({_describe_rejects(entries)}); "
                "check --text_key and the files"
            )
        rejected = sum(sum(entry.rejects.values()) for entry in entries)
        records = rejected + documents + sum(sum(entry.dropped.values()) for entry in entries)
        fraction = rejected / max(1, records)
        if fraction > self._options.max_reject_fraction:
            raise UserError(
                f"{rejected:,} of {records:,} records ({fraction:.2%}) rejected: {_describe_rejects(entries)}; "
                f"repair them, or raise --max_reject_fraction ({self._options.max_reject_fraction})"
            )


def _examples(entries: Sequence[ChunkEntry]) -> tuple[str, ...]:
    return tuple(example for entry in entries for example in entry.examples)[:NUM_EXAMPLES]


def _describe_rejects(entries: Sequence[ChunkEntry]) -> str:
    rejects: Counter[str] = Counter()
    for entry in entries:
        rejects.update(entry.rejects)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejects.items())) or "no records"
    examples = _examples(entries)
    return f"{counts}; first: {', '.join(examples)}" if examples else counts


def _check_options(options: PreprocessOptions) -> None:
    plan = options.plan
    known = {option.leaf: option for option in options_of(PreprocessOptions)}
    problems = out_of_range(known, flatten(options), prefix="--")
    if not problems and plan.shard_index >= plan.num_shards:
        problems.append(
            f"--shard_index {plan.shard_index}: must lie between 0 and {plan.num_shards - 1}, one below --num_shards"
        )
    if not plan.text_key or len(set(plan.text_key)) < len(plan.text_key):
        problems.append(f"--text_key {' '.join(plan.text_key)}: name one key or several different ones")
    if Path(options.tokenizer).is_file():
        problems.append(f"--tokenizer {options.tokenizer} is a file; name the folder that holds it")
    if problems:
        raise UserError(problems)
