"""Finished datasets become one: streamed through the same assembly, with their document indices and manifests.

Duplicates that the tasks of one run have left in are dropped here, over all of them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from metro_megatron.data.file_hashes import damaged_files
from metro_megatron.data.identity import joined_keys, shared
from metro_megatron.data.manifest import (
    NO_DOCUMENTS,
    REMEDY,
    DatasetPaths,
    Manifest,
    SourceEntry,
    Statistics,
    other_tokenizer,
    read_manifest,
)
from metro_megatron.data.shards import Shard, token_dtype
from metro_megatron.errors import UserError
from metro_megatron.preprocess.assembly import AssemblyOptions, assemble, find_duplicates
from metro_megatron.preprocess.journal import (
    DUPLICATE,
    Journal,
    MergedDataset,
    MergeOptions,
    MergePlan,
)
from metro_megatron.preprocess.options import PlanOptions
from metro_megatron.preprocess.output import (
    MANIFEST,
    dataset_manifest,
    explained,
    other_part,
    output_prefix,
    publish,
    refuse_foreign,
    refuse_work,
)
from metro_megatron.preprocess.parts import HASH_BYTES, Part, Section
from metro_megatron.tokenizer.tokenizer import copy_tokenizer

_MOST_NAMED = 5


def merge(prefixes: Sequence[str], output: str, shard_bytes: int, overwrite: bool = False) -> Manifest:
    """Write the documents of all datasets in order as dataset `output`; returns its manifest.

    All tasks of a run, merged in order, give the bytes of the run in one piece. Raises UserError if a dataset is
    damaged, tokenizers or special ids differ, datasets share documents, tasks of a run are missing, out of order, or,
    with --drop_duplicates, joined with others, or `output` is taken.
    """
    if not prefixes:
        raise UserError("no datasets given; name those to merge")
    prefix = output_prefix(output, "")
    manifests = [read_manifest(one) for one in prefixes]
    _check(prefixes, prefix, manifests, shard_bytes)
    plan = MergePlan(MergeOptions(shard_bytes), tuple(map(_merged, prefixes)))
    journal = Journal(DatasetPaths(prefix).work)
    is_assembled = journal.plan() == plan and journal.entry(MANIFEST, Manifest) is not None
    if not overwrite and not is_assembled:
        if journal.plan() is None or DatasetPaths(prefix).manifest.exists():
            refuse_foreign(prefix)
        refuse_work(journal.folder, journal.plan(), plan)
    num_bytes = sum(shard.bin.bytes for one in manifests for shard in one.shards)
    with explained(prefix, num_bytes), journal.opened():
        journal.begin_or_continue(plan)
        if journal.entry(MANIFEST, Manifest) is None:
            copy_tokenizer(DatasetPaths(prefixes[0]).tokenizer, journal.folder / "tokenizer")
            journal.write_entry(MANIFEST, _assemble(journal, prefixes, manifests, shard_bytes))
        return publish(journal, prefix)


def _check(prefixes: Sequence[str], output: str, manifests: Sequence[Manifest], shard_bytes: int) -> None:
    problems = [] if shard_bytes > 0 else [f"--shard_bytes {shard_bytes}: must be positive"]
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if Path(f"{prefix}.bin").resolve() == Path(f"{output}.bin").resolve():
            problems.append(f"{prefix}: is both input and output; choose another --output_prefix")
        if problem := other_tokenizer(prefix, manifest, prefixes[0], first):
            problems.append(problem)
        if manifest.has_pending_duplicates != first.has_pending_duplicates:
            problems.append(
                f"{prefix} and {prefixes[0]}: only one of them still has its duplicates, as a task of a run with "
                "--drop_duplicates does; merge all tasks of that run first"
            )
    runs = [_run(manifest) for manifest in manifests]
    problems += _incomplete_runs(prefixes, manifests, runs)
    for one, other, reason in shared(manifests):
        is_of_one_run = runs[one] is not None and runs[one] == runs[other]
        # Different tasks of one run share documents only where its input says them twice.
        if not is_of_one_run or manifests[one].shard_index == manifests[other].shard_index:
            problems.append(f"{prefixes[one]} and {prefixes[other]} {reason}; name one of them")
    if problems:
        raise UserError(problems)


def _run(manifest: Manifest) -> object:
    """The run of several tasks that a dataset is a part of, to be compared; None where it is none's."""
    if manifest.num_shards == 1:
        return None
    return manifest.tokenizer_sha256, manifest.num_shards, tuple(map(_identity, manifest.sources))


def _incomplete_runs(prefixes: Sequence[str], manifests: Sequence[Manifest], runs: Sequence[object]) -> Iterator[str]:
    """What is missing or out of order of runs of several tasks, of which each dataset is or is not a part."""
    for run in dict.fromkeys(run for run in runs if run):
        places = [place for place, one in enumerate(runs) if one == run]
        prefix, first = prefixes[places[0]], manifests[places[0]]
        count, given = first.num_shards, [manifests[place].shard_index for place in places]
        missing = [task for task in range(count) if task not in given]
        if missing:
            names = ", ".join(other_part(prefix, first.shard_index, count, task) for task in missing[:_MOST_NAMED])
            more = f" and {len(missing) - _MOST_NAMED:,} more" if len(missing) > _MOST_NAMED else ""
            yield f"{names}{more}: missing of the {count} tasks that share the documents out; finish and give them all"
        elif given != list(range(count)) or places != list(range(places[0], places[0] + count)):
            yield f"tasks {', '.join(map(str, given))} of {count} beside {prefix}: give each once and in order"


def _merged(prefix: str) -> MergedDataset:
    content = DatasetPaths(prefix).manifest.read_bytes()
    return MergedDataset(str(Path(prefix).absolute()), hashlib.sha256(content).hexdigest())


def _assemble(journal: Journal, prefixes: Sequence[str], manifests: Sequence[Manifest], shard_bytes: int) -> Manifest:
    first = manifests[0]
    entries = [source for manifest in manifests for source in manifest.sources]
    parts: list[Part] = []
    part_sources: list[int] = []
    first_source = 0
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for part, source in _parts(prefix, manifest):
            parts.append(part)
            part_sources.append(first_source + source)
        first_source += len(manifest.sources)
    _refuse_damage(prefixes, manifests)
    duplicates = journal.folder / "duplicates" if first.has_pending_duplicates else None
    if duplicates:
        find_duplicates(parts, duplicates)
    options = AssemblyOptions(token_dtype(first.vocab_size), shard_bytes, duplicates)
    assembled = assemble(journal, parts, part_sources, options)
    # Sources without documents have no part, so the last ones may be missing.
    counted = [*assembled.sources, *[NO_DOCUMENTS] * (len(entries) - len(assembled.sources))]
    sources = [_recounted(entry, now) for entry, now in zip(entries, counted, strict=True)]
    return dataset_manifest(
        first.tokenizer_sha256,
        first.vocab_size,
        PlanOptions(shard_bytes=shard_bytes).planned(),
        join_sources(sources),
        assembled.shards,
        first.special_ids,
    )


def _refuse_damage(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise UserError for what nobody compares while it is copied: ids without checksums of blocks, and hashes."""
    problems: list[str] = []
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        paths = DatasetPaths(prefix)
        shards = {paths.shard(number).bin: shard for number, shard in enumerate(manifest.shards)}
        problems += damaged_files({path: shard.bin for path, shard in shards.items() if not shard.crc}, REMEDY)
        problems += hashes_problems(prefix, manifest)
    if problems:
        raise UserError(problems)


def hashes_problems(prefix: str, manifest: Manifest) -> Iterator[str]:
    """A line where the hashes of documents that wait for a merge are not those that were written."""
    path = DatasetPaths(prefix).hashes
    if manifest.hashes:
        yield from damaged_files({path: manifest.hashes}, REMEDY)
    elif manifest.has_pending_duplicates:
        yield f"{path}: an earlier version's, without a checksum; write the part again with tools/preprocess_data.py"


def _parts(prefix: str, manifest: Manifest) -> list[tuple[Part, int]]:
    """The shards of a dataset, cut where its sources change, each with the number of its source."""
    if not manifest.shards:
        return []
    found = []
    for shard in Shard.open_all(prefix):
        part = Part.of_dataset(prefix, manifest, shard.number)
        if manifest.has_pending_duplicates:
            offset = shard.first_document * HASH_BYTES
            part = replace(part, hashes=Section(DatasetPaths(prefix).hashes, np.dtype(f"V{HASH_BYTES}"), offset))
        for source, begin, end in manifest.runs(shard.number):
            found.append((part.from_document(begin, end), source))
    return found


def _recounted(entry: SourceEntry, statistics: Statistics) -> SourceEntry:
    """A source after documents of it were dropped as duplicates."""
    dropped = Counter(entry.dropped) + Counter({DUPLICATE: entry.documents - statistics.documents})
    return replace(entry, **vars(statistics), dropped=_ordered(dropped))


def join_sources(entries: Sequence[SourceEntry]) -> list[SourceEntry]:
    """Sources of datasets in order; neighbours of one name, options and files, tasks of one run, become one."""
    joined: list[SourceEntry] = []
    for entry in entries:
        if joined and _identity(joined[-1]) == _identity(entry):
            joined[-1] = _join(joined[-1], entry)
        else:
            joined.append(entry)
    return joined


def _identity(source: SourceEntry) -> object:
    return source.name, source.options, tuple((file.name, file.bytes) for file in source.files)


def _join(first: SourceEntry, second: SourceEntry) -> SourceEntry:
    hits = Counter(first.evaluation_hits)
    hits.update(second.evaluation_hits)  # not +, which would lose files without a hit
    return replace(
        first,
        **vars(first + second),
        rejects=_ordered(Counter(first.rejects) + Counter(second.rejects)),
        dropped=_ordered(Counter(first.dropped) + Counter(second.dropped)),
        files=tuple(
            replace(one, pieces=one.pieces + other.pieces, texts=joined_keys([one.texts, other.texts]))
            for one, other in zip(first.files, second.files, strict=True)
        ),
        evaluation_hits=dict(hits),
    )


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
