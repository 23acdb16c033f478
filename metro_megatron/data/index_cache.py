"""Sample indices on the disk, memory-mapped: built once for the same shards, whoever comes first.

An index is found under a hash of what it was built from. Processes that need one at the same time, on one machine
or several, may all call: they wait for each other at a file lock, and without locks (some network file systems)
each builds its own and the first to finish stays. Nothing here needs process groups.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.config.schema import DataConfig
from metro_megatron.data.samples import SampleIndex, SampleRule, sample_blocks, source_bounds
from metro_megatron.data.shards import Shard
from metro_megatron.errors import UserError
from metro_megatron.files import first_folder, locked, whole_files

_FORMAT = 1
_ARRAYS: dict[str, np.dtype[Any]] = {"shard": np.dtype("<i2"), "start": np.dtype("<i8"), "length": np.dtype("<i4")}
_FACTS = "index.json"


def cache_folder(configured: str, prefixes: Sequence[str]) -> Path:
    """Where indices lie: the configured folder, or sample_index beside the first dataset."""
    return Path(configured) if configured else Path(prefixes[0]).parent / "sample_index"


def sample_indices(
    data: DataConfig,
    train: Sequence[Shard],
    validation: Sequence[Shard],
    on_progress: Callable[[int], object] = lambda samples: None,
) -> tuple[SampleIndex, SampleIndex | None]:
    """The indices of a run: its training samples and its held-out ones, of data.validation or of a fraction.

    Raises UserError as cached_sample_index.
    """
    folder, fraction = cache_folder(data.index_cache, data.train), data.validation_fraction
    rule = SampleRule(data.seq_length, "train" if fraction > 0.0 else "all", fraction)
    index = cached_sample_index(train, rule, folder, on_progress)
    if validation:
        return index, cached_sample_index(validation, SampleRule(data.seq_length), folder, on_progress)
    if fraction > 0.0:
        rule = SampleRule(data.seq_length, "validation", fraction)
        return index, cached_sample_index(train, rule, folder, on_progress)
    return index, None


def cached_sample_index(
    shards: Sequence[Shard],
    rule: SampleRule,
    folder: Path,
    on_progress: Callable[[int], object] = lambda samples: None,
) -> SampleIndex:
    """The sample index of the shards, from `folder` or built into it; `on_progress` hears of samples found.

    Raises UserError as build_sample_index, and if the folder cannot be written.
    """
    target = folder / _key(shards, rule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), wait=True):
            if not (target / _FACTS).exists():
                _build(shards, rule, target, on_progress)
    except OSError as error:
        raise UserError(
            f"sample index {target}: {error.strerror} ({error.filename}); "
            "set data.index_cache to a folder with room for 14 bytes per sample"
        ) from error
    return _open(target, rule)


def _key(shards: Sequence[Shard], rule: SampleRule) -> str:
    contents = [[shard.first_document == 0, shard.sha256, shard.index_sha256] for shard in shards]
    facts = [_FORMAT, rule.seq_length, rule.split, rule.validation_fraction, contents]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _build(shards: Sequence[Shard], rule: SampleRule, target: Path, on_progress: Callable[[int], object]) -> None:
    samples = np.zeros(len(shards), np.int64)
    tokens = 0
    with first_folder(target) as folder:
        with whole_files([folder / f"{name}.bin" for name in _ARRAYS]) as files:
            for block in sample_blocks(shards, rule):
                arrays: list[NDArray[Any]] = [np.full(len(block.start), block.shard), block.start, block.length]
                for file, dtype, values in zip(files, _ARRAYS.values(), arrays, strict=True):
                    file.write(values.astype(dtype).data)
                tokens += int(block.length.sum(dtype=np.int64))
                samples[block.shard] += len(block.start)
                on_progress(int(samples.sum()))
        facts = {"source_bounds": source_bounds(shards, samples), "content_tokens": tokens}
        (folder / _FACTS).write_text(json.dumps(facts))


def _open(folder: Path, rule: SampleRule) -> SampleIndex:
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    bounds = tuple(facts["source_bounds"])
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in _ARRAYS.items()}
    wrong = [name for name, array in arrays.items() if len(array) != bounds[-1]]
    if wrong:
        raise UserError(f"{folder}: damaged ({', '.join(wrong)}); remove it, it is built again")
    return SampleIndex(
        **arrays, source_bounds=bounds, content_tokens=facts["content_tokens"], seq_length=rule.seq_length
    )
