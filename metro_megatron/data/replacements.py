"""Cached corruption: the replacement ids of a run, sample by sample in the run's order, as files.

A folder holds plan.json, what the draws depend on; for each part of the run, steps that follow one another,
`train_00000.ids.npy`, the ids of all its masked tokens, `train_00000.counts.npy`, how many each sample has, and
`train_00000.json`, sizes and SHA-256 of both; and the same of the evaluation's samples, `validation_00000...`.
cache.json, the global position at which every part begins, comes last: without it the cache is unfinished. Ids are in
the order of samples, then of positions. Records are sealed; a part is compared with its own by whoever opens it, as a
part is small: no ids are used before. Written by tools/cache_corruption.py.

n samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import Config
from metro_megatron.data.file_hashes import damaged_files, file_entry
from metro_megatron.data.manifest import FileEntry
from metro_megatron.data.records import SEAL, DamagedRecord, from_plain, sealed, to_json, unsealed
from metro_megatron.errors import UserError
from metro_megatron.files import content_of, sync_folder, whole_files, write_whole

SAMPLER_VERSION = 1
"""Of order, masks and noise (data/order.py, data/masking.py, randomness.py): another one draws others."""
PLAN, CONTENT, LOCK = "plan.json", "cache.json", "lock"
DEFAULT_FOLDER = "corruption_cache"
"""Beside the first dataset of a run."""
Split = Literal["train", "validation"]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class CachePlan:
    """All that the ids depend on."""

    sampler_version: int
    tokenizer: str
    shards: tuple[str, ...]
    """SHA-256 of the training shards."""
    weights: str
    validation: tuple[str, ...]
    """SHA-256 of the validation shards, or the fraction held out, and by what; empty without either."""
    validation_samples: int
    seed: int
    seq_length: int
    masking: str
    batch: str
    """What a step holds, on which its temperature depends."""
    train_steps: int
    temperature: str
    disallow_correct: bool
    precision: str
    frozen_model: str
    """SHA-256 of the model."""

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer: str,
        shards: list[str],
        validation: list[str],
        validation_samples: int,
        frozen_model: str,
    ) -> CachePlan:
        """Of a run, with the hashes of what it reads."""
        data, train, objective = config.data, config.train, config.objective
        batch = f"{train.global_batch_size} samples"
        if not train.global_batch_size:
            batch = f"{train.global_batch_tokens} tokens"
        shares = [objective.mask_probability, objective.keep_probability, objective.random_probability]
        masking = ", ".join([*map(str, shares), *(["whole words"] if objective.whole_word_masking else [])])
        return cls(
            sampler_version=SAMPLER_VERSION,
            tokenizer=tokenizer,
            shards=tuple(shards),
            weights=str([float(weight) for weight in data.weights]),
            validation=tuple(validation),
            validation_samples=validation_samples,
            seed=train.seed,
            seq_length=data.seq_length,
            masking=masking,
            batch=batch,
            train_steps=train.train_steps,
            temperature=str(config.corruption.sampling_temperature),
            disallow_correct=config.corruption.disallow_correct,
            precision=train.precision,
            frozen_model=frozen_model,
        )

    @property
    def sha256(self) -> str:
        """Of all of it."""
        return hashlib.sha256(to_json(self)).hexdigest()

    def differences(self, cached: CachePlan) -> list[str]:
        """Why a cache of the other plan is not this run's, a line each.

        A run may evaluate fewer samples than are cached, and a cached run need not name its model.
        """
        skipped = {"validation_samples"} if self.validation_samples <= cached.validation_samples else set()
        skipped |= set() if self.validation else {"validation"}
        skipped |= set() if self.frozen_model else {"frozen_model"}
        return [
            f"{one.name.replace('_', ' ')} is {_shown(getattr(self, one.name))}, in the cache "
            f"{_shown(getattr(cached, one.name))}"
            for one in fields(self)
            if one.name not in skipped and getattr(self, one.name) != getattr(cached, one.name)
        ]


@dataclass(frozen=True)
class CacheContent:
    """What a finished cache holds."""

    train: tuple[int, ...]
    """Global position at which each part begins, and where the last one ends."""
    validation: tuple[int, ...]
    """The same of the evaluation's samples; (0,) without them."""


@dataclass(frozen=True)
class PartEntry:
    """A part that is written."""

    samples: int
    ids: FileEntry
    counts: FileEntry


@dataclass(frozen=True)
class CacheFolder:
    """The files of a cache."""

    path: Path

    def plan(self) -> CachePlan | None:
        """None where there is none. Raises UserError if it cannot be read."""
        return self._read(PLAN, CachePlan)

    def content(self) -> CacheContent | None:
        """None while it is unfinished. Raises UserError if it cannot be read."""
        return self._read(CONTENT, CacheContent)

    def write(self, name: str, record: object) -> None:
        """Write a record of those names, after the files it speaks of."""
        sync_folder(self.path)
        write_whole(self.path / name, sealed(record))

    def files(self, split: Split, part: int) -> tuple[Path, Path]:
        """Ids, and how many each sample has."""
        return self.path / f"{split}_{part:05d}.ids.npy", self.path / f"{split}_{part:05d}.counts.npy"

    def entry(self, split: Split, part: int) -> PartEntry | None:
        """None for a part that is not written. Raises UserError if its record is damaged."""
        return self._read(_entry_name(split, part), PartEntry)

    def damage(self, split: Split, part: int, entry: PartEntry) -> list[str]:
        """What of a part is not as it was written, a line each; reads both files."""
        return list(
            damaged_files(dict(zip(self.files(split, part), (entry.ids, entry.counts), strict=True)), self._remedy)
        )

    def problems(self) -> Iterator[str]:
        """A line for all that is wrong with a cache, finished or not; nothing where there is none."""
        try:
            self.plan()
            self.content()
        except UserError as error:
            yield from error.problems
        for split in get_args(Split):
            numbers = (path.stem.rpartition("_")[2] for path in sorted(self.path.glob(f"{split}_*.json")))
            for number in filter(str.isdecimal, numbers):
                try:
                    if entry := self.entry(split, int(number)):
                        yield from self.damage(split, int(number), entry)
                except UserError as error:
                    yield from error.problems

    def part(
        self, split: Split, part: int, bounds: Sequence[int]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint16]]:
        """Ids and counts, both of them still on the disk, after they were compared with what was written.

        bounds: where the parts begin, and the last one ends. Raises UserError for a file that is missing or damaged.
        """
        entry = self._agreeing_entry(split, part, bounds)
        if problems := self.damage(split, part, entry):
            raise UserError(problems)
        ids, counts = map(self._load, self.files(split, part))
        return ids, counts

    def write_part(
        self, split: Split, part: int, ids: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int
    ) -> None:
        """A part, whole or not at all; ids in the smallest type that holds the vocabulary."""
        with whole_files(self.files(split, part)) as (ids_file, counts_file):
            np.save(ids_file, ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32))
            np.save(counts_file, counts.astype(np.uint16))
        entries = map(file_entry, self.files(split, part))
        self.write(_entry_name(split, part), PartEntry(len(counts), *entries))

    def reader(self, split: Split) -> ReplacementReader:
        """Of a finished cache. Raises UserError if it is not, or lacks a file."""
        content = self.content()
        if content is None:
            raise UserError(
                f"{self.path}: no finished cache of replacements (no {CONTENT}); write it with "
                "tools/cache_corruption.py, which continues an unfinished one"
            )
        bounds = getattr(content, split)
        problems: list[str] = []
        for part in range(len(bounds) - 1):
            try:
                self._agreeing_entry(split, part, bounds)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return ReplacementReader(self, split, bounds)

    @property
    def _remedy(self) -> str:
        return f"give its command again (tools/cache_corruption.py), which draws damaged parts of {self.path} again"

    def _agreeing_entry(self, split: Split, part: int, bounds: Sequence[int]) -> PartEntry:
        """Of a part whose files have their sizes. Raises UserError where they have not, or there is none."""
        entry = self.entry(split, part)
        if entry is None:
            raise UserError(f"{self.path / _entry_name(split, part)}: missing; {self._remedy}")
        expected = bounds[part + 1] - bounds[part]
        if entry.samples != expected:
            raise UserError(
                f"{self.path / _entry_name(split, part)}: has {entry.samples:,} samples, {CONTENT} says {expected:,}; "
                f"{self._remedy}"
            )
        for path, one in zip(self.files(split, part), (entry.ids, entry.counts), strict=True):
            size = path.stat().st_size if path.exists() else 0
            if size != one.bytes:
                raise UserError(f"{path}: {size:,} bytes, not {one.bytes:,}: damaged or missing; {self._remedy}")
        return entry

    def _load(self, path: Path) -> NDArray[Any]:
        try:
            loaded: NDArray[Any] = np.load(path, mmap_mode="r")
            return loaded
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged or missing ({error}); {self._remedy}") from error

    def _read(self, name: str, kind: type[_Record]) -> _Record | None:
        path = self.path / name
        try:
            content = content_of(path)
            if SEAL.encode() not in content:
                raise DamagedRecord("it has no checksum, which caches of earlier versions lack")
            return from_plain(kind, unsealed(content))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedRecord as error:
            remedy = self._remedy if kind is PartEntry else f"remove {self.path} and write it again"
            raise UserError(f"{path}: damaged ({error}); {remedy}") from error


def _entry_name(split: Split, part: int) -> str:
    """Of the record that finishes a part."""
    return f"{split}_{part:05d}.json"


class ReplacementReader:
    """Reads the ids of any samples of one split; the part that was read last stays open."""

    def __init__(self, folder: CacheFolder, split: Split, bounds: tuple[int, ...]):
        self._folder, self._split = folder, split
        self._bounds = np.asarray(bounds)
        self._part = -1
        self._ids: NDArray[np.unsignedinteger] = np.empty(0, np.uint16)
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def num_samples(self) -> int:
        return int(self._bounds[-1])

    def read(self, places: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of the samples at global positions [n], one after another, which have so many masked tokens each [n].

        Raises UserError if the cache has other numbers of them, or does not reach so far.
        """
        found = [self._sample(place, count) for place, count in zip(places.tolist(), counts.tolist(), strict=True)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def _sample(self, place: int, count: int) -> NDArray[np.int64]:
        if not self._bounds[0] <= place < self._bounds[-1]:
            raise UserError(f"{self._folder.path}: ends at sample {self.num_samples:,}, sample {place:,} is needed")
        part = int(np.searchsorted(self._bounds, place, side="right")) - 1
        if part != self._part:
            self._ids, counts = self._folder.part(self._split, part, self._bounds.tolist())
            self._ends = np.cumsum(counts, dtype=np.int64)
            self._part = part
        number = place - int(self._bounds[part])
        begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        if end - begin != count or end > len(self._ids):
            raise UserError(
                f"{self._folder.path}: sample {place:,} has another number of masked tokens than the run's; the cache "
                "is damaged or of another run: write it again with tools/cache_corruption.py"
            )
        return self._ids[begin:end].astype(np.int64)


def _shown(value: object) -> str:
    """Hashes in short."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
