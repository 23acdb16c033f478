"""Finished datasets become one: streamed through the same assembly, with their document indices and manifests.

Duplicates that the tasks of one run have left in are dropped here, over all of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metro_megatron.data.shards import DatasetPaths, Shard, read_manifest, token_dtype
from metro_megatron.errors import UserError
from metro_megatron.preprocess.assembly import AssemblyOptions, Statistics, assemble
from metro_megatron.preprocess.duplicates import find_duplicates
from metro_megatron.preprocess.encoding import DUPLICATE
from metro_megatron.preprocess.journal import Journal
from metro_megatron.preprocess.manifest import dataset_manifest, join_sources
from metro_megatron.preprocess.output import MANIFEST, explained, output_prefix, publish, refuse_foreign, refuse_work
from metro_megatron.preprocess.parts import HASH_BYTES, Part, Section
from metro_megatron.tokenizer.tokenizer import copy_tokenizer


def merge(prefixes: Sequence[str], output: str, shard_bytes: int, overwrite: bool = False) -> dict[str, Any]:
    """Write the documents of all datasets in order as dataset `output`; returns its manifest.

    All tasks of a run, merged in order, give the bytes of the run in one piece. Raises UserError if a dataset is
    damaged, tokenizers differ, tasks of a run with --drop_duplicates are joined with others, or `output` is taken.
    """
    prefix = output_prefix(output, "")
    manifests = [read_manifest(one) for one in prefixes]
    _check(prefixes, prefix, manifests, shard_bytes)
    plan = {"options": {"shard_bytes": shard_bytes}, "files": [_as_file(one) for one in prefixes]}
    journal = Journal(DatasetPaths(prefix).work)
    is_assembled = journal.plan() == plan and journal.entry(MANIFEST) is not None
    if not overwrite and not is_assembled:
        if journal.plan() is None or DatasetPaths(prefix).manifest.exists():
            refuse_foreign(prefix)
        refuse_work(journal.folder, journal.plan(), plan)
    num_bytes = sum(shard["bin"]["bytes"] for one in manifests for shard in one["shards"])
    with explained(prefix, num_bytes), journal.opened():
        journal.begin_or_continue(plan)
        if journal.entry(MANIFEST) is None:
            copy_tokenizer(DatasetPaths(prefixes[0]).tokenizer, journal.folder / "tokenizer")
            journal.write_entry(MANIFEST, _assemble(journal, prefixes, manifests, shard_bytes))
        return publish(journal, prefix)


def _check(prefixes: Sequence[str], output: str, manifests: Sequence[dict[str, Any]], shard_bytes: int) -> None:
    problems = [] if shard_bytes > 0 else [f"--shard_bytes {shard_bytes}: must be positive"]
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if Path(f"{prefix}.bin").absolute() == Path(f"{output}.bin").absolute():
            problems.append(f"{prefix}: is both input and output; choose another --output_prefix")
        if manifest["tokenizer_sha256"] != first["tokenizer_sha256"]:
            problems.append(
                f"{prefix} has tokenizer {manifest['tokenizer_sha256'][:12]}, {prefixes[0]} has "
                f"{first['tokenizer_sha256'][:12]}; preprocess both with one tokenizer"
            )
        if manifest["has_pending_duplicates"] != first["has_pending_duplicates"]:
            problems.append(
                f"{prefix} and {prefixes[0]}: only one of them still has its duplicates, as a task of a run with "
                "--drop_duplicates does; merge all tasks of that run first"
            )
    if len(set(map(str, prefixes))) < len(prefixes):
        problems.append("a prefix is given twice; name it once")
    if problems:
        raise UserError(problems)


def _as_file(prefix: str) -> dict[str, Any]:
    content = DatasetPaths(prefix).manifest.read_bytes()
    return {"name": str(Path(prefix).absolute()), "bytes": hashlib.sha256(content).hexdigest()}


def _assemble(
    journal: Journal, prefixes: Sequence[str], manifests: Sequence[dict[str, Any]], shard_bytes: int
) -> dict[str, Any]:
    dtype = token_dtype(manifests[0]["vocab_size"])
    has_pending = manifests[0]["has_pending_duplicates"]
    entries = [source for manifest in manifests for source in manifest["sources"]]
    parts: list[Part] = []
    part_sources: list[int] = []
    first_source = 0
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for part, source in _parts(prefix, manifest, dtype):
            parts.append(part)
            part_sources.append(first_source + source)
        first_source += len(manifest["sources"])
    duplicates = journal.folder / "duplicates" if has_pending else None
    if duplicates:
        find_duplicates(parts, duplicates)
    assembled = assemble(journal, parts, part_sources, AssemblyOptions(dtype, shard_bytes, duplicates))
    counted = [*assembled.sources, *(Statistics() for _ in range(len(entries) - len(assembled.sources)))]
    sources = [_recounted(entry, now) for entry, now in zip(entries, counted, strict=True)]
    head = {
        **{name: manifests[0][name] for name in ("tokenizer_sha256", "vocab_size")},
        "shard_bytes": shard_bytes,
        "shard_index": 0,
        "num_shards": 1,
        "has_pending_duplicates": False,
    }
    return dataset_manifest(head, join_sources(sources), assembled.shards)


def _parts(prefix: str, manifest: dict[str, Any], dtype: np.dtype[Any]) -> list[tuple[Part, int]]:
    """The shards of a dataset, cut where its sources change, each with the number of its source."""
    if not manifest["shards"]:
        return []
    shards = Shard.open_all(prefix)
    ends = np.cumsum([source["documents"] for source in manifest["sources"]])
    found = []
    for shard in shards:
        num_documents = len(shard.document_index) - 1
        part = Part.of_shard(shard.prefix, dtype, len(shard.unit_lengths), num_documents)
        if manifest["has_pending_duplicates"]:
            offset = shard.first_document * HASH_BYTES
            part = replace(part, hashes=Section(DatasetPaths(prefix).hashes, np.dtype(f"V{HASH_BYTES}"), offset))
        last = shard.first_document + num_documents
        inner = [int(end) for end in ends if shard.first_document < end < last]
        borders = [shard.first_document, *inner, last]
        for begin, end in zip(borders, borders[1:], strict=False):
            cut = part.from_document(begin - shard.first_document, end - shard.first_document)
            found.append((cut, int(np.searchsorted(ends, begin, side="right"))))
    return found


def _recounted(entry: dict[str, Any], statistics: Statistics) -> dict[str, Any]:
    """A source after documents of it were dropped as duplicates."""
    dropped = dict(entry["dropped"])
    if statistics.documents < entry["documents"]:
        dropped[DUPLICATE] = dropped.get(DUPLICATE, 0) + entry["documents"] - statistics.documents
    return {**entry, **statistics.to_json(), "dropped": dict(sorted(dropped.items()))}
