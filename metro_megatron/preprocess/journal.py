"""The work folder of a run: what it is to do, and which of its steps are finished.

A step (a chunk, a shard, the manifest) is finished when its entry, a JSON file, lies under its final name. An entry is
renamed into its name after the files it speaks of, so kill -9 at any moment loses unfinished steps only.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from metro_megatron.data.manifest import Manifest, ShardContent, SourceOptions, Statistics
from metro_megatron.data.records import DamagedRecord, from_plain, sealed, unsealed
from metro_megatron.errors import UserError
from metro_megatron.files import content_of, locked, remove_partial, sync_folder, write_whole

TOO_SHORT, CONTAMINATED, DUPLICATE = "too_short", "contaminated", "duplicate"
"""Why a good document is left out on request."""

_PLAN, _LOCK = "plan.json", "lock"
_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class PlannedOptions(SourceOptions):
    """What the bytes of the output depend on, beside inputs and tokenizer."""

    shard_bytes: int
    shard_index: int
    num_shards: int
    """The run is number shard_index of num_shards that share the chunks out."""

    @property
    def has_pending_duplicates(self) -> bool:
        """Whether copies can be told only when all num_shards are merged; until then hashes lie beside the shards."""
        return self.drop_duplicates and self.num_shards > 1


@dataclass(frozen=True)
class PlannedFile:
    """An input file as it was when the run was planned."""

    name: str
    """Below the folder that all files of the source share."""
    bytes: int
    mtime_ns: int = 0
    """0 where nothing is known of it."""
    ctime_ns: int = 0
    """The same; no one can set it back."""

    @property
    def content(self) -> "PlannedFile":
        """What matters of it: times only save looking at its bytes again."""
        return PlannedFile(self.name, self.bytes)


@dataclass(frozen=True)
class Plan:
    """What the run of one source is to do."""

    tokenizer_sha256: str
    source: str
    options: PlannedOptions
    files: tuple[PlannedFile, ...]

    @property
    def content(self) -> "Plan":
        """The same without times of files."""
        return replace(self, files=tuple(file.content for file in self.files))


@dataclass(frozen=True)
class MergeOptions:
    """What a merged dataset depends on, beside the datasets."""

    shard_bytes: int


@dataclass(frozen=True)
class MergedDataset:
    """A dataset that is merged."""

    name: str
    """Its prefix."""
    bytes: str
    """SHA-256 of its manifest, which knows those of its shards."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge is to do."""

    options: MergeOptions
    files: tuple[MergedDataset, ...]

    @property
    def content(self) -> "MergePlan":
        """As Plan's."""
        return self


AnyPlan = Plan | MergePlan


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk that became a part."""

    documents: int
    units: int
    tokens: int
    text_bytes: int
    """Of all records, decompressed."""
    rejects: dict[str, int]
    """Records that gave no document, by reason."""
    dropped: dict[str, int]
    """Documents left out on request, by reason."""
    evaluation_hits: tuple[int, ...]
    """[F] documents that repeat a text of each evaluation file."""
    examples: tuple[str, ...]
    """Where the first rejected records are."""
    bytes_read: int
    sha256: str
    """Of the chunk's bytes."""
    engine: str
    """What encoded it."""
    checksums: tuple[int, ...] = ()
    """CRC-32 of the files of its part; none in journals of earlier versions."""
    texts: str | None = None
    """Key of its texts (`data.identity`), of those that are left out on request, too; None in such journals."""


@dataclass(frozen=True)
class ShardStep:
    """A shard that is written, and where the next one begins."""

    shard: ShardContent
    next_part: int
    next_document: int
    """In that part."""
    sources: tuple[Statistics, ...]
    """What each source has contributed to all shards so far."""


_KINDS: dict[str, type] = {"chunk": ChunkEntry, "shard": ShardStep, "manifest.json": Manifest}
"""Of entries, by how their names begin."""


class Journal:
    """What is known of a run that works in `folder`; one process at a time `opened` it, workers only add entries."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder alone, made if missing, without the unfinished files of a run that died.

        Raises UserError if another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / _LOCK, wait=False))
            except BlockingIOError as error:
                raise UserError(
                    f"{self.folder}: another process works in it; wait for it, or choose another prefix"
                ) from error
            remove_partial(self.folder)
            yield

    def plan(self) -> AnyPlan | None:
        """What the run is to do; None if no run has begun here. Raises UserError if it cannot be read."""
        # Either tool may find the other's folder; a merge has no tokenizer of its own.
        content = self._content(_PLAN)
        is_merge = isinstance(content, dict) and "tokenizer_sha256" not in content
        return self.entry(_PLAN, MergePlan) if is_merge else self.entry(_PLAN, Plan)

    def begin_or_continue(self, plan: AnyPlan, anew: bool = False) -> None:
        """Continue a run of this plan, whose finished chunks were found to be as they were; else begin it.

        That is on an emptied folder, if another plan or none is here, or `anew` asks for it.
        """
        earlier = self.plan()
        if anew or earlier is None or earlier.content != plan.content:
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
        if anew or earlier != plan:
            self.write_entry(_PLAN, plan)

    def entry(self, name: str, kind: type[_Entry]) -> _Entry | None:
        """Entry `name`, None if that step is not finished. Raises UserError for a damaged one."""
        content = self._content(name)
        try:
            return None if content is None else from_plain(kind, content)
        except DamagedRecord as error:
            raise self._damaged(name, error) from error

    def write_entry(self, name: str, entry: object) -> None:
        """Finish a step: the files it speaks of must have their names."""
        # Their names must be on the disk before the entry's: after a power failure it would speak of files not there.
        sync_folder(self.folder)
        write_whole(self.folder / name, sealed(entry))

    def problems(self) -> Iterator[str]:
        """A line for each damaged entry; nothing where there is no folder."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                if path.name == _PLAN:
                    self.plan()
                elif kind := _KINDS.get(path.name.partition("-")[0]):
                    self.entry(path.name, kind)
            except UserError as error:
                yield from error.problems

    def _content(self, name: str) -> object:
        try:
            content = unsealed(content_of(self.folder / name))
        except FileNotFoundError:
            return None
        except DamagedRecord as error:
            raise self._damaged(name, error) from error
        if content is None:
            raise self._damaged(name, DamagedRecord("no object"))
        return content

    def _damaged(self, name: str, error: ValueError) -> UserError:
        return UserError(f"{self.folder / name}: damaged ({error}); remove the folder {self.folder} and run again")
