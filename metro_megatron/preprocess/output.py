"""Where a dataset goes: what may be replaced there, what its manifest says, how it gets its final names."""

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from metro_megatron.data.file_hashes import file_entries
from metro_megatron.data.identity import joined_keys
from metro_megatron.data.manifest import (
    FORMAT_VERSION,
    DatasetPaths,
    InputEntry,
    Manifest,
    ShardContent,
    ShardEntry,
    ShardPaths,
    SourceEntry,
    SourceOptions,
    Statistics,
    read_manifest,
    shard_suffix,
)
from metro_megatron.data.records import plain, sealed
from metro_megatron.errors import UserError
from metro_megatron.files import is_partial, move_whole, sync_folder, write_whole
from metro_megatron.preprocess.assembly import shard_name
from metro_megatron.preprocess.journal import DUPLICATE, AnyPlan, ChunkEntry, Journal, Plan, PlannedFile, PlannedOptions
from metro_megatron.text.inputs import Chunk, InputFile
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.vocabulary import TRAINED_IDS, SpecialIds

MANIFEST = "manifest.json"
"""Journal entry of an assembled dataset: only its final names are missing."""

_SHARES = ("shard_bytes", "shard_index", "num_shards")
"""Options that say how documents were shared out, not what they are; a merged dataset has its own."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PART = ".part-{:04d}-of-{:04d}"
_SOURCE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def output_prefix(pattern: str, source: str) -> str:
    """The prefix of a source: `pattern` with its name for {source}.

    Raises UserError for a name that could lead out of the folder, and a prefix that names a folder.
    """
    if "{source}" in pattern and not _SOURCE_NAME.fullmatch(source):
        raise UserError(
            f"source name {source!r} cannot stand in --output_prefix {pattern}; "
            "use letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    prefix = pattern.replace("{source}", source)
    name = prefix.rpartition("/")[2]
    if name in ("", ".", "..") or Path(prefix).is_dir():
        raise UserError(f"--output_prefix {prefix} names a folder; append a file name, for example {prefix}/train")
    return prefix


def part_prefix(prefix: str, number: int, count: int) -> str:
    """The prefix of what task `number` of `count` writes of a dataset."""
    return prefix + _PART.format(number, count)


def other_part(prefix: str, number: int, count: int, other: int) -> str:
    """The prefix of task `other`, from that of task `number` of `count`; its number where that was renamed."""
    suffix = _PART.format(number, count)
    is_ours = prefix.endswith(suffix)
    return part_prefix(prefix.removesuffix(suffix), other, count) if is_ours else f"task {other} of {count}"


def refuse_foreign(prefix: str, changes: Sequence[str] = ()) -> None:
    """Raise UserError if anything of a dataset lies at the prefix; `changes` say how a finished one differs."""
    paths = DatasetPaths(prefix)
    shard = paths.shard(0)
    if paths.manifest.exists():
        advice = (
            f"--output_prefix {prefix}: a finished dataset of other inputs or options is there already; "
            "choose another or add --overwrite"
        )
        raise UserError([*changes, advice])
    for path in (*shard.files, paths.tokenizer):
        if path.exists():
            raise UserError(f"--output_prefix {prefix}: {path} is there already; choose another or add --overwrite")


def refuse_work(work: Path, earlier: AnyPlan | None, plan: AnyPlan) -> None:
    """Raise UserError if the work folder is not this tool's, or its run had another plan; names what differs."""
    if earlier is None:
        if work.exists() and any(path.name != "lock" and not is_partial(path) for path in work.iterdir()):
            raise UserError(f"{work} is there and was not made by this tool; choose another --output_prefix")
        return
    if changes := differences(earlier.content, plan.content):
        advice = (
            f"{work} holds an unfinished run that differs as above; repeat its command, or start again with --overwrite"
        )
        raise UserError([*changes, advice])


def differences(earlier: AnyPlan, now: AnyPlan) -> list[str]:
    """What two plans do not share, one line each; keys that only one of them has are not compared."""
    before, after = _flat(earlier), _flat(now)
    common = before.keys() & after.keys()
    lines = [f"{key}: was {before[key]}, is {after[key]}" for key in common if before[key] != after[key]]
    files = [{file.name for file in plan.files} for plan in (earlier, now)]
    lines += [f"{name}: no longer among the inputs" for name in files[0] - files[1]]
    lines += [f"{name}: not among the inputs before" for name in files[1] - files[0]]
    return sorted(lines)


def _flat(plan: AnyPlan) -> dict[str, Any]:
    """All values of a plan, by the names under which users know them."""
    flat = plain(plan)
    options, files = flat.pop("options"), flat.pop("files")
    flat |= {f"--{key}": value for key, value in options.items()}
    for file in files:
        name = file.pop("name")
        flat |= {f"file {name} {key}": value for key, value in file.items()}
    return flat


def planned_files(files: Sequence[InputFile]) -> tuple[PlannedFile, ...]:
    """The input files of a source as its plan holds them, with their times now."""
    stats = (file.stat() for file in files)
    return tuple(
        PlannedFile(name, file.size, status.st_mtime_ns, status.st_ctime_ns)
        for name, file, status in zip(relative_names(files), files, stats, strict=True)
    )


def relative_names(files: Sequence[InputFile]) -> list[str]:
    """Names below the folder that all of these files share."""
    paths = [os.path.abspath(file.path) for file in files]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def plan_of_manifest(manifest: Manifest) -> Plan:
    """The plan that led to a dataset of one source, as far as its manifest tells: without times of files."""
    source, shares = manifest.sources[0], {name: getattr(manifest, name) for name in _SHARES}
    files = tuple(PlannedFile(file.name, file.bytes) for file in source.files)
    return Plan(manifest.tokenizer_sha256, source.name, PlannedOptions(**vars(source.options), **shares), files)


def source_entry(
    plan: Plan,
    files: Sequence[InputFile],
    encoded: Sequence[tuple[Chunk, ChunkEntry]],
    statistics: Statistics,
    evaluation_files: Sequence[InputFile],
) -> SourceEntry:
    """What the manifest says of a source: its chunks were `encoded`, its shards hold documents of these statistics."""
    pieces: dict[str, list[tuple[int, int, str]]] = {file.path: [] for file in files}
    texts: dict[str, list[str | None]] = {file.path: [] for file in files}
    rejects: Counter[str] = Counter()
    # Documents of the parts that are in no shard are copies of others.
    dropped = Counter({DUPLICATE: sum(entry.documents for _, entry in encoded) - statistics.documents})
    hits = Counter(dict.fromkeys(relative_names(evaluation_files) if evaluation_files else [], 0))
    for chunk, entry in encoded:
        pieces[chunk.file.path].append((chunk.begin, chunk.end, entry.sha256))
        texts[chunk.file.path].append(entry.texts)
        rejects.update(entry.rejects)
        dropped.update(entry.dropped)
        hits.update(dict(zip(hits, entry.evaluation_hits, strict=True)))
    return SourceEntry(
        plan.source,
        **vars(statistics),
        rejects=dict(sorted(rejects.items())),
        dropped=dict(sorted((+dropped).items())),
        options=SourceOptions(**{one.name: getattr(plan.options, one.name) for one in fields(SourceOptions)}),
        files=tuple(
            InputEntry(file.name, file.bytes, tuple(pieces[each.path]), joined_keys(texts[each.path]))
            for file, each in zip(plan.files, files, strict=True)
        ),
        evaluation_hits=dict(hits),
    )


def dataset_manifest(
    tokenizer_sha256: str,
    vocab_size: int,
    options: PlannedOptions,
    sources: Sequence[SourceEntry],
    shards: Sequence[ShardContent],
    special_ids: SpecialIds = TRAINED_IDS,
) -> Manifest:
    """The manifest of a dataset of these sources in these shards; `options` say how documents were shared out."""
    rejects: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for source in sources:
        rejects.update(source.rejects)
        dropped.update(source.dropped)
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        special_ids=special_ids,
        **{name: getattr(options, name) for name in _SHARES},
        has_pending_duplicates=options.has_pending_duplicates,
        documents=sum(source.documents for source in sources),
        units=sum(source.units for source in sources),
        tokens=sum(source.tokens for source in sources),
        rejects=dict(sorted(rejects.items())),
        dropped=dict(sorted(dropped.items())),
        sources=tuple(sources),
        shards=tuple(ShardEntry(shard_suffix(number), **vars(shard)) for number, shard in enumerate(shards)),
    )


def publish(journal: Journal, prefix: str) -> Manifest:
    """Give an assembled dataset its final names, the manifest last, and remove the work folder; returns the manifest.

    May be called again after an interruption. An earlier dataset at the prefix is replaced.
    """
    manifest = journal.entry(MANIFEST, Manifest)
    assert manifest is not None
    paths = DatasetPaths(prefix)
    # The manifest goes first and comes last: whoever finds one finds the files that it speaks of.
    _remove_manifest(prefix, len(manifest.shards))
    for number in range(len(manifest.shards)):
        working, final = ShardPaths(str(journal.folder / shard_name(number))), paths.shard(number)
        for finished, path in zip(working.files, final.files, strict=True):
            if finished.exists():  # else a call that was interrupted has moved it
                move_whole(finished, path)
    if manifest.has_pending_duplicates and (journal.folder / "hashes").exists():
        move_whole(journal.folder / "hashes", paths.hashes)
    copy_tokenizer(journal.folder / "tokenizer", paths.tokenizer)
    sync_folder(paths.manifest.absolute().parent)
    manifest = replace(manifest, tokenizer_files=file_entries(paths.tokenizer))
    write_whole(paths.manifest, sealed(manifest))
    shutil.rmtree(journal.folder)
    return manifest


def _remove_manifest(prefix: str, num_shards: int) -> None:
    """Remove an earlier dataset's manifest, and its shards from number `num_shards` on."""
    paths = DatasetPaths(prefix)
    try:
        earlier = len(read_manifest(prefix).shards)
    except UserError:
        earlier = 0
    paths.manifest.unlink(missing_ok=True)
    paths.hashes.unlink(missing_ok=True)
    for number in range(num_shards, earlier):
        for path in paths.shard(number).files:
            path.unlink(missing_ok=True)


@contextmanager
def explained(prefix: str, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the file system refuses into a UserError; `needed_bytes` is an estimate of the whole output."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise UserError(f"cannot write {prefix}: {error.strerror} ({error.filename})") from error
        folder = Path(prefix).absolute().parent
        needed = f"about {needed_bytes / 1e6:,.1f} MB" if needed_bytes else "more"
        raise UserError(
            f"cannot write {prefix}: {error.strerror}; the output needs {needed}, {folder} has "
            f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free. Free some space and run the same command again: "
            "finished chunks are kept, nothing that was there is damaged"
        ) from error
