"""The manifest of a dataset: what it was made of, what came of it. Free of paths, times and machines."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from metro_megatron.data.shards import FORMAT_VERSION, shard_suffix
from metro_megatron.preprocess.assembly import Statistics
from metro_megatron.text.inputs import Chunk, InputFile, find_inputs

RUN_OPTIONS = ("shard_bytes", "shard_index", "num_shards")
"""Options that say how documents were shared out, not what they are; a merged dataset has its own."""

HEAD = ("tokenizer_sha256", "vocab_size", *RUN_OPTIONS, "has_pending_duplicates")
"""Keys of a manifest that are common to all its sources."""


def relative_names(files: Sequence[InputFile]) -> list[str]:
    """Names below the folder that all files of a source share."""
    folders = [os.path.dirname(os.path.abspath(file.path)) for file in files]
    common = os.path.commonpath(folders)
    return [os.path.relpath(os.path.abspath(file.path), common) for file in files]


def file_entries(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Name, bytes and time of every file, as plans hold them."""
    return [
        {"name": name, "bytes": file.size, "mtime_ns": file.mtime_ns}
        for name, file in zip(relative_names(files), files, strict=True)
    ]


def source_entry(
    plan: Mapping[str, Any],
    files: Sequence[InputFile],
    encoded: Sequence[tuple[Chunk, dict[str, Any]]],
    statistics: Statistics,
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    """What the manifest says of a source; a file's pieces are its chunks: begin, end, SHA-256 of those bytes."""
    pieces: dict[str, list[list[Any]]] = {file.path: [] for file in files}
    rejects: Counter[str] = Counter()
    for chunk, entry in encoded:
        pieces[chunk.file.path].append([chunk.begin, chunk.end, entry["sha256"]])
        rejects.update(entry["rejects"])
    return {
        "name": plan["source"],
        **statistics.to_json(),
        "rejects": dict(sorted(rejects.items())),
        "dropped": dict(sorted(dropped.items())),
        "options": {key: value for key, value in plan["options"].items() if key not in RUN_OPTIONS},
        "files": [
            {"name": name, "bytes": file.size, "pieces": pieces[file.path]}
            for name, file in zip(relative_names(files), files, strict=True)
        ],
    }


def evaluation_hits(patterns: Sequence[str], encoded: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Documents left out because of each evaluation file, from the journal entries of chunks."""
    names = relative_names(find_inputs(patterns)) if patterns else []
    counts = [sum(column) for column in zip(*(entry["evaluation_hits"] for entry in encoded), strict=True)]
    return dict(zip(names, counts or [0] * len(names), strict=True))


def dataset_manifest(
    head: Mapping[str, Any], sources: Sequence[dict[str, Any]], shards: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of a dataset; `head` has the keys of HEAD, shards are as `assemble` returns them."""
    rejects: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for source in sources:
        rejects.update(source["rejects"])
        dropped.update(source["dropped"])
    return {
        "format_version": FORMAT_VERSION,
        **{key: head[key] for key in HEAD},
        **{name: sum(source[name] for source in sources) for name in ("documents", "units", "tokens")},
        "rejects": dict(sorted(rejects.items())),
        "dropped": dict(sorted(dropped.items())),
        "sources": list(sources),
        "shards": [{"name": shard_suffix(number), **shard} for number, shard in enumerate(shards)],
    }


def plan_of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The plan that led to a dataset of one source, as far as its manifest tells: without times of files."""
    source = manifest["sources"][0]
    return {
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "source": source["name"],
        "options": source["options"] | {name: manifest[name] for name in RUN_OPTIONS},
        "files": [{"name": file["name"], "bytes": file["bytes"]} for file in source["files"]],
    }


def join_sources(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources of datasets in order; neighbours of one name, options and files, tasks of one run, become one."""
    joined: list[dict[str, Any]] = []
    for entry in entries:
        if joined and _identity(joined[-1]) == _identity(entry):
            joined[-1] = _join(joined[-1], entry)
        else:
            joined.append(entry)
    return joined


def _identity(source: Mapping[str, Any]) -> list[Any]:
    return [source["name"], source["options"], [(file["name"], file["bytes"]) for file in source["files"]]]


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    statistics = Statistics.from_json(first) + Statistics.from_json(second)
    counts = {
        name: dict(sorted((Counter(first[name]) + Counter(second[name])).items())) for name in ("rejects", "dropped")
    }
    one, other = (source["evaluation_hits"] for source in (first, second))
    hits = {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
    files = [
        one | {"pieces": one["pieces"] + other["pieces"]}
        for one, other in zip(first["files"], second["files"], strict=True)
    ]
    return {**first, **statistics.to_json(), **counts, "evaluation_hits": hits, "files": files}
