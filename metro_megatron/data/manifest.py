"""The manifest of a dataset: what it was made of and what came of it. Free of paths, times and machines.

PREFIX.manifest.json is a `Manifest` as records are sealed. A dataset has sources, each with the statistics of its
documents, and shards, in whose order the sources' documents follow one another.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metro_megatron.data.records import DamagedRecord, from_plain, unsealed
from metro_megatron.errors import UserError
from metro_megatron.files import content_of
from metro_megatron.vocabulary import TRAINED_IDS, SpecialIds

FORMAT_VERSION = 3
_READ_VERSIONS = (2, FORMAT_VERSION)
"""Manifests of version 2 have no seal, and know neither checksums of blocks nor the tokenizer's files."""
_TOOL = "with tools/preprocess_data.py"
REMEDY = f"copy it again from where it is whole, or write it again {_TOOL}"
"""Of a file that is damaged."""

_LAST_POWER = 62
EDGES: NDArray[np.int64] = np.unique(np.ceil(2.0 ** (np.arange(_LAST_POWER + 1) / 2)).astype(np.int64))
"""Bin k holds lengths from EDGES[k] to below EDGES[k + 1]: powers of the square root of 2, rounded up."""


@dataclass(frozen=True)
class ShardPaths:
    """The files of a shard, from its own prefix, PREFIX_00000."""

    prefix: str

    @cached_property
    def bin(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @cached_property
    def idx(self) -> Path:
        return Path(f"{self.prefix}.idx")

    @cached_property
    def crc(self) -> Path:
        """Checksums of the blocks of `.bin`."""
        return Path(f"{self.prefix}.crc")

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.bin, self.idx, self.crc

    def with_entries(self, content: "ShardContent") -> "dict[Path, FileEntry]":
        """The files that the shard has, with what is known of each."""
        entries = content.bin, content.idx, content.crc
        return {path: entry for path, entry in zip(self.files, entries, strict=True) if entry}


@dataclass(frozen=True)
class DatasetPaths:
    """The files of a dataset, from its prefix."""

    prefix: str

    @property
    def manifest(self) -> Path:
        return Path(f"{self.prefix}.manifest.json")

    @property
    def tokenizer(self) -> Path:
        return Path(f"{self.prefix}.tokenizer")

    @property
    def hashes(self) -> Path:
        """Hashes of all documents, of a part whose duplicates are dropped when parts are merged."""
        return Path(f"{self.prefix}.hashes")

    @property
    def work(self) -> Path:
        """Folder of an unfinished run."""
        return Path(f"{self.prefix}.work")

    def shard(self, number: int) -> ShardPaths:
        return ShardPaths(f"{self.prefix}{shard_suffix(number)}")


def shard_suffix(number: int) -> str:
    """What follows the dataset's prefix in the names of a shard."""
    return f"_{number:05d}"


@dataclass(frozen=True)
class LengthHistogram:
    """Counts of lengths of at least 1, in bins between EDGES."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES), np.int64))

    @classmethod
    def from_lengths(cls, lengths: ArrayLike) -> "LengthHistogram":
        """Of lengths [n] in tokens."""
        bins = np.searchsorted(EDGES, np.asarray(lengths), side="right") - 1
        return cls(np.bincount(bins, minlength=len(EDGES)).astype(np.int64))

    def __add__(self, other: "LengthHistogram") -> "LengthHistogram":
        return LengthHistogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LengthHistogram) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """How many lengths were counted."""
        return int(self.counts.sum())

    def to_json(self) -> dict[str, int]:
        """Count by the smallest length of a bin, empty bins left out."""
        return {str(edge): count for edge, count in zip(EDGES.tolist(), self.counts.tolist(), strict=True) if count}

    @classmethod
    def from_json(cls, content: dict[str, int]) -> "LengthHistogram":
        """What to_json gave. Raises ValueError for a length where no bin begins, or a count that is none."""
        bins = {str(edge): number for number, edge in enumerate(EDGES.tolist())}
        if not content.keys() <= bins.keys() or any(type(count) is not int for count in content.values()):
            raise ValueError("no histogram of lengths")
        histogram = cls()
        for edge, count in content.items():
            histogram.counts[bins[edge]] = count
        return histogram


@dataclass(frozen=True)
class Named:
    """What has a name, which comes first in its record."""

    name: str


@dataclass(frozen=True)
class Statistics:
    """What is known of some documents: how many, and how long."""

    documents: int
    units: int
    tokens: int
    document_lengths: LengthHistogram
    unit_lengths: LengthHistogram

    @classmethod
    def of(cls, document_tokens: NDArray[np.int64], unit_lengths: NDArray[np.integer]) -> "Statistics":
        """Of documents with so many tokens each [D], of units of such lengths [U]."""
        return cls(
            len(document_tokens),
            len(unit_lengths),
            int(document_tokens.sum()),
            LengthHistogram.from_lengths(document_tokens),
            LengthHistogram.from_lengths(unit_lengths),
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Statistics)))


NO_DOCUMENTS = Statistics(0, 0, 0, LengthHistogram(), LengthHistogram())


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardContent:
    """Counts of a shard, and its files."""

    documents: int
    units: int
    tokens: int
    bin: FileEntry
    idx: FileEntry
    crc: FileEntry | None = None
    """None in datasets of earlier versions, whose blocks have no checksums."""


@dataclass(frozen=True)
class ShardEntry(ShardContent, Named):
    """A shard of a dataset, by the suffix of its files."""


@dataclass(frozen=True)
class InputEntry(Named):
    """An input file, by its name below the folder that all files of its source share."""

    bytes: int
    pieces: tuple[tuple[int, int, str], ...]
    """(begin, end, SHA-256 of those bytes) of each of its chunks."""
    texts: str | None = None
    """Key of the texts read from it (`data.identity`); None in datasets of earlier versions."""


@dataclass(frozen=True)
class SourceOptions:
    """What the documents of a source depend on, beside inputs and tokenizer."""

    text_keys: tuple[str, ...]
    unit: str
    max_document_bytes: int
    min_tokens: int
    drop_duplicates: bool
    decontaminate: tuple[str, ...]
    """SHA-256 of the evaluation files, so that nothing depends on where they lie."""
    chunk_bytes: int


@dataclass(frozen=True)
class SourceEntry(Statistics, Named):
    """A source of a dataset: its documents, what was left out, what it was made of."""

    rejects: dict[str, int]
    """Records that gave no document, by reason."""
    dropped: dict[str, int]
    """Documents left out on request, by reason."""
    options: SourceOptions
    files: tuple[InputEntry, ...]
    evaluation_hits: dict[str, int]
    """Documents left out because of each evaluation file."""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a dataset."""

    format_version: int
    tokenizer_sha256: str
    vocab_size: int
    shard_bytes: int
    shard_index: int
    num_shards: int
    """The dataset is number shard_index of num_shards that share the documents out."""
    has_pending_duplicates: bool
    """Whether duplicates are dropped when it is merged; the hashes of its documents lie beside it until then."""
    documents: int
    units: int
    tokens: int
    rejects: dict[str, int]
    dropped: dict[str, int]
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    tokenizer_files: dict[str, FileEntry] | None = None
    """Files of the tokenizer's folder by name; None in datasets of earlier versions."""
    special_ids: SpecialIds = TRAINED_IDS
    """The tokenizer's."""
    hashes: FileEntry | None = None
    """The hashes of documents that wait for a merge; None without any, and in parts of earlier versions."""

    def source_of(self, document: int) -> int:
        """Index in `sources` of the source that a document, by its number in the dataset, comes from."""
        return int(np.searchsorted(self._source_ends, document, side="right"))

    def runs(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """(source, begin, end): the documents of a shard, by their numbers in the shard, cut where sources change."""
        first = sum(one.documents for one in self.shards[:shard])
        last = first + self.shards[shard].documents
        inner = {end for end in self._source_ends if first < end < last}
        for begin, end in pairwise([first, *sorted(inner), last]):
            yield self.source_of(begin), begin - first, end - first

    @property
    def _source_ends(self) -> list[int]:
        return np.cumsum([source.documents for source in self.sources]).tolist()


def read_manifest(prefix: str) -> Manifest:
    """The manifest of a finished dataset. Raises UserError if there is none or it is damaged."""
    path = DatasetPaths(prefix).manifest
    try:
        content = unsealed(content_of(path))
    except FileNotFoundError as error:
        begun = DatasetPaths(prefix).work.exists() or DatasetPaths(prefix).shard(0).bin.exists()
        what = "it was not finished" if begun else "there is no such dataset"
        near = near_prefixes(prefix)
        begin = "" if path.is_absolute() else ", or start this in the folder where the relative path begins"
        remedy = f"did you mean {' or '.join(near)}?" if near else f"write it {_TOOL}{begin}"
        raise UserError(f"{path}: no such file, so {what}; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except DamagedRecord as error:
        raise UserError(f"{path}: damaged ({error}); {REMEDY}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READ_VERSIONS:
        versions = " and ".join(map(str, _READ_VERSIONS))
        raise UserError(f"{path}: format_version {version}, this program reads {versions}; write it again {_TOOL}")
    try:
        manifest = from_plain(Manifest, content)
        # Names are those of files: one that leads out of the dataset's folder must never be opened.
        if any(shard.name != shard_suffix(number) for number, shard in enumerate(manifest.shards)):
            raise DamagedRecord("no usable shards")
        if any(Path(name).name != name for name in manifest.tokenizer_files or {}):
            raise DamagedRecord("no usable tokenizer_files")
    except DamagedRecord as error:
        raise UserError(f"{path}: damaged ({error}); {REMEDY}") from error
    return manifest


def other_tokenizer(prefix: str, manifest: Manifest, first_prefix: str, first: Manifest) -> str | None:
    """What to say of two datasets whose ids do not mean the same; None where they do."""
    (theirs, their_ids), (ours, our_ids) = (
        (f"tokenizer {one.tokenizer_sha256[:12]} with {one.vocab_size:,} ids", one.special_ids)
        for one in (manifest, first)
    )
    if manifest.tokenizer_sha256 == first.tokenizer_sha256 and (theirs, their_ids) == (ours, our_ids):
        return None
    if their_ids != our_ids:
        theirs, ours = f"{theirs} ({their_ids})", f"{ours} ({our_ids})"
    return f"{prefix} has {theirs}, {first_prefix} has {ours}; preprocess both with one tokenizer"


def near_prefixes(given: str) -> list[str]:
    """Datasets, five at most, that someone may mean by this prefix: a file's, a folder's, a glob, one spelled alike."""
    path = Path(given)
    folder = path if path.is_dir() else path.parent
    there = filter(Path.exists, sorted(folder.glob("*.manifest.json")))
    own = {one.name.removesuffix(".manifest.json"): str(one) for one in there}
    names = list(own) if path.is_dir() else [name for name in own if path.name.startswith((f"{name}.", f"{name}_"))]
    names = names or fnmatch.filter(own, path.name) or get_close_matches(path.name, own)
    return [own[name].removesuffix(".manifest.json") for name in names[:5]]
