"""Manifests, journals, indices and `.idx` with anything in them: read as they are, or refused in a line a problem."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metro_megatron.data.index_files import FACTS, IndexFacts, index_damage
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.data.records import SEAL, DamagedRecord, plain
from metro_megatron.data.samples import SampleRule, cached_sample_index
from metro_megatron.data.shards import INDEX_HEADER, open_shards
from metro_megatron.errors import UserError
from metro_megatron.inspection.verification import verify
from metro_megatron.preprocess.journal import ChunkEntry, Journal
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess
from tests.fuzz.test_readers import fuzzed

NUMBERS = st.integers(-3, 3) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**30]) | st.floats()
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=6
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.txt").write_text("\n\n".join("\n".join(review) for review in reviews[:20]))
    plan = PlanOptions(shard_bytes=8000)
    preprocess(PreprocessOptions([f"{folder}/a.txt"], str(tokenizer_folder), f"{folder}/d", plan))
    return folder


@pytest.fixture(scope="module")
def prefix(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy to damage."""
    target = tmp_path_factory.mktemp("copy") / "own"
    shutil.copytree(whole, target)
    return str(target / "d")


def refusal(action: Callable[[], object]) -> str:
    """What a refusal says, a line a problem; empty if there is none."""
    try:
        action()
    except UserError as error:
        assert error.problems and all(problem.strip() and "\n" not in problem for problem in error.problems)
        return str(error)
    return ""


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], object]:
    """Of a value somewhere in nested dicts and lists: another one, none, or one more."""
    steps, kind, value = (
        draw(st.lists(st.integers(0, 100), min_size=1, max_size=6)),
        draw(st.integers(0, 2)),
        draw(JSON),
    )

    def change(content: Any) -> None:
        for number, step in enumerate(steps):
            keys = list(content) if isinstance(content, dict) else range(len(content))
            if not keys:
                return
            key = keys[step % len(keys)]
            if number == len(steps) - 1 or not isinstance(content[key], dict | list):
                if kind == 0:
                    content[key] = value
                elif kind == 1:
                    del content[key]
                elif isinstance(content, dict):
                    content[str(value)] = content[key]
                else:
                    content.append(value)
                return
            content = content[key]

    return change


@fuzzed
@given(change=changes())
def test_manifests_of_other_values(prefix: str, change: Callable[[Any], object]) -> None:
    """Without a seal, as an earlier version or a hand writes them."""
    path = DatasetPaths(prefix).manifest
    original = path.read_bytes()
    content = json.loads(original)
    before = copy.deepcopy(content)
    del content[SEAL]
    change(content)
    path.write_text(json.dumps(content))
    try:
        said = refusal(lambda: open_shards([prefix])) + refusal(lambda: verify(prefix))
    finally:
        path.write_bytes(original)
    del before[SEAL]
    assert said or plain(content) == before or _says_the_same(content, before)


def _says_the_same(one: Any, other: Any) -> bool:
    """Keys that no count depends on: names, options and what was left out."""
    free = (
        "shard_bytes",
        "num_shards",
        "shard_index",
        "has_pending_duplicates",
        "rejects",
        "dropped",
        "tokenizer_files",
    )
    parts = [{key: value for key, value in each.items() if key not in (*free, "sources")} for each in (one, other)]
    counted = ("documents", "units", "tokens", "document_lengths", "unit_lengths")
    sources = [[{key: source.get(key) for key in counted} for source in each["sources"]] for each in (one, other)]
    return parts[0] | {"shards": 0} == parts[1] | {"shards": 0} and sources[0] == sources[1]


@fuzzed
@given(content=JSON)
def test_any_json_as_a_record(tmp_path: Path, content: Any) -> None:
    for name in ("d.manifest.json", "plan.json", "chunk-000000.json", FACTS):
        (tmp_path / name).write_text(json.dumps(content))
    assert refusal(lambda: read_manifest(str(tmp_path / "d")))
    journal = Journal(tmp_path)
    assert refusal(journal.plan) and refusal(lambda: journal.entry("chunk-000000.json", ChunkEntry))
    assert list(journal.problems())
    assert index_damage(tmp_path, by_hash=True)
    with pytest.raises(DamagedRecord):
        IndexFacts.read(tmp_path)


@fuzzed
@given(
    section=st.sampled_from(["header", "lengths", "offsets", "documents", "cut", "more"]),
    place=st.integers(0, 10**6),
    value=NUMBERS.filter(lambda value: isinstance(value, int)),
)
def test_indices_that_their_manifest_agrees_with(prefix: str, section: str, place: int, value: int) -> None:
    """Nothing but their own shape tells that they are wrong: verifying does, opening and reading must not crash."""
    paths = DatasetPaths(prefix)
    shard = paths.shard(place % 2)
    idx, manifest = shard.idx.read_bytes(), paths.manifest.read_bytes()
    damaged = _damaged_index(idx, section, place, value)
    content = json.loads(manifest)
    del content[SEAL]
    content["shards"][place % 2]["idx"] = {"bytes": len(damaged), "sha256": hashlib.sha256(damaged).hexdigest()}
    shard.idx.write_bytes(damaged)
    paths.manifest.write_text(json.dumps(content))
    try:
        said = refusal(lambda: verify(prefix))
        refusal(lambda: open_shards([prefix]))
    finally:
        shard.idx.write_bytes(idx)
        paths.manifest.write_bytes(manifest)
    assert bool(said) == (damaged != idx)


def _damaged_index(idx: bytes, section: str, place: int, value: int) -> bytes:
    units, boundaries = INDEX_HEADER.unpack(idx[: INDEX_HEADER.size])[3:]
    if section in ("cut", "more"):
        return idx[: place % len(idx)] if section == "cut" else idx + bytes(1 + place % 20)
    begins = np.cumsum([0, INDEX_HEADER.size, 4 * units, 8 * units, 8 * boundaries]).tolist()
    number = ["header", "lengths", "offsets", "documents"].index(section)
    size = [1, 4, 8, 8][number]
    count = (begins[number + 1] - begins[number]) // size
    at = begins[number] + place % count * size
    return idx[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + idx[at + size :]


@fuzzed
@given(change=changes())
def test_facts_of_an_index(prefix: str, change: Callable[[Any], object]) -> None:
    """A sealed one with other values does not match its seal; it is built again."""
    shards, folder = open_shards([prefix]), Path(prefix).parent / "sample_index"
    whole = cached_sample_index(shards, SampleRule(64), folder)
    (path,) = folder.glob(f"*/{FACTS}")
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    again = cached_sample_index(shards, SampleRule(64), folder)
    assert again.start.tolist() == whole.start.tolist() and again.source_bounds == whole.source_bounds
