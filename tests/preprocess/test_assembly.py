"""Parts to shards against a simple model of it: cuts, duplicates, interruptions, blocks."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import metro_megatron.preprocess.assembly as assembly
import metro_megatron.preprocess.parts as parts_module
from metro_megatron.data.manifest import ShardContent
from metro_megatron.files import whole_files
from metro_megatron.preprocess.assembly import AssemblyOptions, assemble, find_duplicates, shard_name
from metro_megatron.preprocess.journal import Journal
from metro_megatron.preprocess.parts import Part, PartWriter, part_paths

DTYPE = np.dtype(np.uint16)
Documents = list[list[list[int]]]

unit = st.lists(st.integers(5, 9), min_size=1, max_size=6)
documents = st.lists(st.lists(unit, min_size=1, max_size=4), max_size=8)


def write_parts(folder: Path, chunks: list[Documents]) -> list[Part]:
    found = []
    for number, content in enumerate(chunks):
        stem = folder / f"chunk-{number:06d}"
        with whole_files(part_paths(stem)) as files:
            writer = PartWriter(files, DTYPE)
            for units in content:
                digest = hashlib.blake2b(repr(units).encode(), digest_size=16).digest()
                lengths = np.array(list(map(len, units)), np.int32)
                writer.append(np.concatenate(units), lengths, np.array([len(units)]), digest)
        found.append(Part.of_chunk(stem, DTYPE, len(content), has_hashes=True))
    return found


def model(chunks: list[Documents], room: int, unique: bool) -> list[Documents]:
    """Documents of every shard."""
    shards: list[Documents] = []
    seen: set[str] = set()
    filled = room + 1
    for units in (units for content in chunks for units in content):
        if unique and repr(units) in seen:
            continue
        seen.add(repr(units))
        size = sum(map(len, units))
        if filled + size > room:
            shards.append([])
            filled = 0
        shards[-1].append(units)
        filled += size
    return shards


def read_shard(folder: Path, number: int, entry: ShardContent) -> Documents:
    prefix = str(folder / shard_name(number))
    part = Part.of_shard(prefix, DTYPE, entry.units, entry.documents)
    lengths = part.units.read(0, entry.units)
    ids = np.split(part.tokens.read(0, entry.tokens), np.cumsum(lengths)[:-1])
    ends = part.documents.read(0, entry.documents).tolist()
    return [[i.tolist() for i in ids[begin:end]] for begin, end in zip([0, *ends], ends, strict=False)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, max_size=4), st.integers(1, 40), st.booleans(), st.integers(1, 5))
def test_shards_are_the_models(
    tmp_path: Path, monkeypatch, chunks: list[Documents], room: int, unique: bool, block: int
) -> None:
    monkeypatch.setattr(parts_module, "_BLOCK_UNITS", block)
    monkeypatch.setattr(parts_module, "_BLOCK_DOCUMENTS", block + 1)
    monkeypatch.setattr(assembly, "_BLOCK_TOKENS", block + 2)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    parts = write_parts(tmp_path, chunks)
    path = tmp_path / "duplicates" if unique else None
    if path:
        total = sum(map(len, chunks))
        assert find_duplicates(parts, path, documents_per_pass=3) == total - sum(map(len, model(chunks, room, True)))
    made = assemble(Journal(tmp_path), parts, range(len(parts)), AssemblyOptions(DTYPE, 2 * room, path))
    expected = model(chunks, room, unique)
    assert [read_shard(tmp_path, i, entry) for i, entry in enumerate(made.shards)] == expected
    assert sum(source.tokens for source in made.sources) == sum(entry.tokens for entry in made.shards)


@pytest.mark.parametrize("stop_after", range(12))
def test_an_assembly_that_stops_anywhere_goes_on(tmp_path: Path, stop_after: int) -> None:
    generator = np.random.default_rng(0)
    chunks = [[[[int(i)] * 3, [6]] for i in generator.integers(5, 60, 20)] for _ in range(5)]
    entries = {}
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        parts = write_parts(folder, chunks)
        find_duplicates(parts, folder / "duplicates")
        stems = [folder / f"chunk-{number:06d}" for number in range(5)]
        calls = iter(range(10**6))

        def drop(number: int, stems=stems) -> None:
            for path in part_paths(stems[number])[:3]:
                path.unlink(missing_ok=True)

        def stop(tokens: int, calls=calls) -> None:
            if next(calls) == stop_after:
                raise KeyboardInterrupt

        options = AssemblyOptions(DTYPE, 60, folder / "duplicates", drop)
        if folder.name == "stopped":
            broken = AssemblyOptions(DTYPE, 60, folder / "duplicates", drop, stop)
            with pytest.raises(KeyboardInterrupt):
                assemble(Journal(folder), parts, [0] * 5, broken)
        made = assemble(Journal(folder), parts, [0] * 5, options)
        entries[folder.name] = (made.shards, made.sources[0])
    assert entries["whole"] == entries["stopped"] and len(entries["whole"][0]) > 3
    for path in (tmp_path / "whole").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
