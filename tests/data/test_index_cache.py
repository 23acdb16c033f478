"""Indices on the disk equal those in memory, are built once, and follow what they were built from."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metro_megatron.config.schema import DataConfig
from metro_megatron.data.samples import SampleIndex, SampleRule, build_sample_index, cached_sample_index, sample_indices
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess

ARRAYS = ("shard", "start", "length")


@pytest.fixture(scope="module")
def make_dataset(reviews, tokenizer_folder, tmp_path_factory) -> Callable[..., str]:
    """make_dataset("a", 0, 100): a dataset of some of the reviews, cut into shards of shard_bytes."""
    folder = tmp_path_factory.mktemp("datasets")

    def make(name: str, first: int, last: int, shard_bytes: int = 40_000) -> str:
        (folder / f"{name}.txt").write_text("\n\n".join("\n".join(review) for review in reviews[first:last]))
        plan = PlanOptions(shard_bytes=shard_bytes)
        preprocess(PreprocessOptions([str(folder / f"{name}.txt")], str(tokenizer_folder), str(folder / name), plan))
        return str(folder / name)

    return make


@pytest.fixture(scope="module")
def prefixes(make_dataset) -> list[str]:
    return [make_dataset("a", 0, 150), make_dataset("b", 150, 200)]


def assert_equal(one: SampleIndex, other: SampleIndex) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    facts = [(index.source_bounds, index.content_tokens, index.seq_length) for index in (one, other)]
    assert facts[0] == facts[1]


def built(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_equals_the_index_in_memory_and_is_built_once(prefixes, tmp_path):
    shards = open_shards(prefixes)
    assert len(shards) > 3
    for rule in (SampleRule(64), SampleRule(64, "train", 0.2), SampleRule(64, "validation", 0.2), SampleRule(40)):
        expected = build_sample_index(shards, rule.seq_length, rule.split, rule.validation_fraction)
        assert_equal(cached_sample_index(shards, rule, tmp_path), expected)
        seen: list[int] = []
        assert_equal(cached_sample_index(shards, rule, tmp_path, seen.append), expected)
        assert not seen
    assert len(built(tmp_path)) == 4
    cached_sample_index(shards[:-1], SampleRule(64), tmp_path)
    cached_sample_index(shards[::-1], SampleRule(64), tmp_path)
    assert len(built(tmp_path)) == 6


def test_held_out_documents_do_not_depend_on_the_shards(make_dataset):
    few, many = (make_dataset(name, 0, 150, size) for name, size in (("few", 10**9), ("many", 20_000)))
    found = []
    for prefix in (few, many):
        shards = open_shards([prefix])
        index = build_sample_index(shards, 64, "validation", 0.3)
        before = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
        found.append((before[index.shard] + index.start).tolist())
    assert len(open_shards([few])) == 1 and len(open_shards([many])) > 3
    assert found[0] == found[1] and found[0]


def test_indices_of_a_run(prefixes, tmp_path):
    data = DataConfig(train=prefixes, validation_fraction=0.25, seq_length=64, index_cache=str(tmp_path))
    index, held_out = sample_indices(data, open_shards(prefixes), [])
    whole = build_sample_index(open_shards(prefixes), 64)
    assert held_out and len(index) + len(held_out) == len(whole)
    assert len(index.source_bounds) == 3 and index.source_bounds[2] == len(index)
    data = DataConfig(train=prefixes[:1], validation=prefixes[1:], seq_length=64, index_cache=str(tmp_path))
    index, held_out = sample_indices(data, open_shards(prefixes[:1]), open_shards(prefixes[1:]))
    assert held_out
    assert_equal(held_out, build_sample_index(open_shards(prefixes[1:]), 64))


def _build(prefixes: list[str], folder: Path) -> int:
    calls: list[int] = []
    cached_sample_index(open_shards(prefixes), SampleRule(64), folder, calls.append)
    return bool(calls)


def test_processes_at_the_same_time_build_it_once(prefixes, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        builders = pool.starmap(_build, [(prefixes, tmp_path)] * 3, chunksize=1)
    assert sum(builders) == 1
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_what_is_there_is_neither_locked_nor_written(prefixes, tmp_path, monkeypatch):
    """As in a folder that may only be read."""
    shards = open_shards(prefixes)
    expected = cached_sample_index(shards, SampleRule(64), tmp_path)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    monkeypatch.setattr("metro_megatron.data.samples.locked", lambda *_, **__: pytest.fail("locked"))
    assert_equal(cached_sample_index(shards, SampleRule(64), tmp_path), expected)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


def test_damage_and_folders_that_cannot_be_written(prefixes, tmp_path, capsys):
    shards = open_shards(prefixes)
    cached_sample_index(shards, SampleRule(64), tmp_path)
    (name,) = built(tmp_path)
    path = tmp_path / name / "start.bin"
    os.truncate(path, path.stat().st_size - 8)
    assert_equal(cached_sample_index(shards, SampleRule(64), tmp_path), build_sample_index(shards, 64))
    assert f"{path}: " in (said := capsys.readouterr().err) and "is built again" in said
    with pytest.raises(UserError, match="set data.index_cache to a folder"):
        cached_sample_index(shards, SampleRule(64), path / "below")
