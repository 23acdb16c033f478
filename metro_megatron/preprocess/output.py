"""Where a dataset goes: what may be replaced, how a finished one gets its final names, what a full disk means."""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metro_megatron.data.shards import DatasetPaths, ShardPaths, read_manifest
from metro_megatron.errors import UserError
from metro_megatron.files import is_partial, move_whole, sync_folder, write_whole
from metro_megatron.preprocess.assembly import shard_name
from metro_megatron.preprocess.journal import Journal, to_json
from metro_megatron.tokenizer.tokenizer import copy_tokenizer

MANIFEST = "manifest.json"
"""Journal entry of an assembled dataset: only its final names are missing."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    for path in (shard.bin, shard.idx, paths.tokenizer):
        if path.exists():
            raise UserError(f"--output_prefix {prefix}: {path} is there already; choose another or add --overwrite")


def refuse_work(work: Path, earlier: Mapping[str, Any] | None, plan: Mapping[str, Any]) -> None:
    """Raise UserError if the work folder is not this tool's, or its run had another plan; names what differs."""
    if earlier is None:
        if work.exists() and any(path.name != "lock" and not is_partial(path) for path in work.iterdir()):
            raise UserError(f"{work} is there and was not made by this tool; choose another --output_prefix")
        return
    if changes := differences(earlier, plan):
        advice = (
            f"{work} holds an unfinished run that differs as above; repeat its command, or start again with --overwrite"
        )
        raise UserError([*changes, advice])


def publish(journal: Journal, prefix: str) -> dict[str, Any]:
    """Give an assembled dataset its final names, the manifest last, and remove the work folder; returns the manifest.

    May be called again after an interruption. An earlier dataset at the prefix is replaced.
    """
    manifest = journal.entry(MANIFEST)
    assert manifest is not None
    paths = DatasetPaths(prefix)
    _remove_manifest(prefix, len(manifest["shards"]))
    for number in range(len(manifest["shards"])):
        working = ShardPaths(str(journal.folder / shard_name(number)))
        final = paths.shard(number)
        for source, target in ((working.bin, final.bin), (working.idx, final.idx)):
            if source.exists():
                move_whole(source, target)
    if manifest["has_pending_duplicates"] and (journal.folder / "hashes").exists():
        move_whole(journal.folder / "hashes", paths.hashes)
    copy_tokenizer(journal.folder / "tokenizer", paths.tokenizer)
    sync_folder(paths.manifest.absolute().parent)
    write_whole(paths.manifest, to_json(manifest))
    shutil.rmtree(journal.folder)
    return manifest


def _remove_manifest(prefix: str, num_shards: int) -> None:
    """Remove an earlier dataset's manifest, and its shards from number `num_shards` on."""
    paths = DatasetPaths(prefix)
    try:
        earlier = len(read_manifest(prefix)["shards"])
    except UserError:
        earlier = 0
    paths.manifest.unlink(missing_ok=True)
    paths.hashes.unlink(missing_ok=True)
    for number in range(num_shards, earlier):
        paths.shard(number).bin.unlink(missing_ok=True)
        paths.shard(number).idx.unlink(missing_ok=True)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two plans do not share, one line each; keys that only one of them has are not compared."""
    before, after = _flat(earlier), _flat(now)
    common = before.keys() & after.keys()
    lines = [f"{key}: was {before[key]}, is {after[key]}" for key in common if before[key] != after[key]]
    files = [{file["name"] for file in plan["files"]} for plan in (earlier, now)]
    lines += [f"{name}: no longer among the inputs" for name in files[0] - files[1]]
    lines += [f"{name}: not among the inputs before" for name in files[1] - files[0]]
    return sorted(lines)


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in plan.items() if key not in ("options", "files")}
    flat |= {f"--{key}": value for key, value in plan["options"].items()}
    for file in plan["files"]:
        flat |= {f"file {file['name']} {key}": file[key] for key in ("bytes", "mtime_ns") if key in file}
    return flat


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
