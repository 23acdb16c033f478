"""A flipped bit anywhere in a dataset or what lies beside it is named by whoever verifies or reads it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from metro_megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from metro_megatron.data.blocks import BLOCK_BYTES, TokenStreams
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.data.records import sealed
from metro_megatron.data.replacements import (
    CONTENT,
    DEFAULT_FOLDER,
    PLAN,
    CacheContent,
    CacheFolder,
    CachePlan,
)
from metro_megatron.data.samples import SampleRule, cache_folder, cached_sample_index
from metro_megatron.data.shards import open_shards
from metro_megatron.data.token_counts import cached_token_counts, count_tokens
from metro_megatron.errors import UserError
from metro_megatron.inspection.verification import verify
from metro_megatron.preprocess.merging import merge
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess
from tests.data.two_sources import texts_of

FLIPS = int(os.environ.get("FLIPS", 120))
"""`make fuzz` sets 10,000."""


PART = "p.part-0000-of-0002"
"""What lies beside the dataset."""
PLANNED = CachePlan.of(Config(), "tokenizer", ["shard"], [], 30, "model")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> str:
    """Two sources in three shards, with an index of samples, a cache of replacements, the journal of a run that would
    replace it, and a part that waits for a merge."""
    folder = tmp_path_factory.mktemp("flips")
    for name, documents in texts_of(reviews).items():
        (folder / f"{name}.txt").write_text("\n\n".join("\n".join(document) for document in documents[:60]))
        options = PreprocessOptions(
            [f"{name}={folder}/{name}.txt"], str(tokenizer_folder), f"{folder}/{name}", PlanOptions()
        )
        preprocess(options)
    prefix = str(folder / "d")
    (folder / "own").mkdir()
    prefix = str(folder / "own" / "d")
    merge([str(folder / "long"), str(folder / "short")], prefix, 40_000)
    cached_sample_index(open_shards([prefix]), SampleRule(64), cache_folder("", [prefix]))
    cached_token_counts(open_shards([prefix]), 2000, cache_folder("", [prefix]))
    leave_journal(prefix, folder / "long.txt", tokenizer_folder)
    write_cache(folder / "own" / DEFAULT_FOLDER)
    part = PlanOptions(drop_duplicates=True, num_shards=2, chunk_bytes=2000)
    preprocess(PreprocessOptions([str(folder / "short.txt")], str(tokenizer_folder), str(folder / "own" / "p"), part))
    return prefix


def write_cache(path: Path) -> None:
    """Two parts and one of an evaluation, of random ids."""
    path.mkdir()
    folder, generator = CacheFolder(path), np.random.default_rng(2)
    for split, part in (("train", 0), ("train", 1), ("validation", 0)):
        counts = generator.integers(1, 20, 30)
        folder.write_part(split, part, generator.integers(5, 2000, counts.sum()), counts, 2000)
    folder.write(PLAN, PLANNED)
    folder.write(CONTENT, CacheContent((0, 30, 60), (0, 30)))


def leave_journal(prefix: str, text: Path, tokenizer_folder: Path) -> None:
    """What an interrupted run at the prefix leaves."""
    plan = PlanOptions(chunk_bytes=20_000)
    options = PreprocessOptions([str(text)], str(tokenizer_folder), f"{prefix}-other", plan, max_reject_fraction=0.0)
    text.write_bytes(text.read_bytes() + b"\n\n\xff")
    with pytest.raises(UserError, match="not_utf8"):
        preprocess(options)
    shutil.copytree(DatasetPaths(f"{prefix}-other").work, DatasetPaths(prefix).work)
    shutil.rmtree(DatasetPaths(f"{prefix}-other").work)


def files_of(prefix: str) -> list[Path]:
    """Of a dataset and what lies beside it; of unfinished work the journal: whoever goes on compares, makes or copies
    all else again."""
    work = DatasetPaths(prefix).work
    found = (path for path in Path(prefix).parent.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in found if work not in path.parents or path.parent == work and path.suffix == ".json")


def problems_of(prefix: str, path: Path) -> list[str]:
    """Of the dataset, or of the part if the file is its."""
    part = f"{Path(prefix).parent}/{PART}"
    try:
        verify(part if str(path).startswith(part) else prefix)
    except UserError as error:
        return error.problems
    return []


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_flips_over_all_files_are_named(dataset: str) -> None:
    verify(dataset)
    files = files_of(dataset)
    kinds = {".bin", ".idx", ".crc", ".json", ".model", ".npy", ".hashes"}
    assert {path.suffix for path in files} == kinds and len(files) > 30, files
    generator = np.random.default_rng(0)
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = int(generator.integers(8 * path.stat().st_size))
        flip(path, bit)
        problems = problems_of(dataset, path)
        assert any(path.name in problem for problem in problems), (path, bit, problems)
        flip(path, bit)
    verify(dataset)


def test_opening_names_all_but_the_ids(dataset: str) -> None:
    """Whoever trains opens: what is not read by blocks is compared at once, a damaged index is built again."""
    generator = np.random.default_rng(1)
    paths = DatasetPaths(dataset)
    shards = (path for path in Path(dataset).parent.glob("d_*") if path.suffix != ".bin")
    for path in sorted([paths.manifest, *paths.tokenizer.iterdir(), *shards]):
        bit = int(generator.integers(8 * path.stat().st_size))
        flip(path, bit)
        with pytest.raises(UserError, match=path.name):
            open_shards([dataset])
        flip(path, bit)


def test_a_damaged_index_is_built_again(
    dataset: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards, rule = cache_folder("", [dataset]), open_shards([dataset]), SampleRule(64)
    whole = cached_sample_index(shards, rule, folder)
    starts = whole.start.tolist()
    for path in sorted(folder.glob("*/*")):
        flip(path, 77)
        assert cached_sample_index(shards, rule, folder).start.tolist() == starts
        printed = capsys.readouterr().err
        assert path.name in printed and "is built again" in printed
        assert cached_sample_index(shards, rule, folder, pytest.fail).content_tokens == whole.content_tokens
    monkeypatch.setenv("WORLD_SIZE", "2")
    flip(next(folder.glob("*/start.bin")), 77)
    with pytest.raises(UserError, match="has been built again; start the run again"):
        cached_sample_index(shards, rule, folder)
    monkeypatch.setenv("LOCAL_RANK", "1")
    flip(next(folder.glob("*/start.bin")), 77)
    cached_sample_index(shards, rule, folder)  # compares sizes; the first process of its machine is what refuses
    flip(next(folder.glob("*/start.bin")), 77)


def test_damaged_counts_are_made_again(dataset: str, capsys: pytest.CaptureFixture) -> None:
    folder, shards = cache_folder("", [dataset]), open_shards([dataset])
    counts = cached_token_counts(shards, 2000, folder)
    assert capsys.readouterr().err == "" and counts.tolist() == count_tokens(shards, 2000).tolist()
    (path,) = folder.glob("*.counts.json")
    whole = path.read_bytes()
    for content in (b"", whole[:-100], whole.replace(b" 0,\n  0,", b" 1,\n  -1,", 1)):
        path.write_bytes(content)
        assert cached_token_counts(shards, 2000, folder).tolist() == counts.tolist()
        assert capsys.readouterr().err == f"{path}: damaged; is made again\n" and path.read_bytes() == whole


def test_damaged_replacements_are_not_trained_on(dataset: str) -> None:
    """A reader refuses the part; sizes, and what is no part, as soon as there is a reader."""
    folder = CacheFolder(Path(dataset).parent / DEFAULT_FOLDER)
    generator = np.random.default_rng(3)
    for path in sorted(folder.path.glob("*")):
        if path.name == PLAN or path.name.startswith("validation"):
            continue
        bit = int(generator.integers(8 * path.stat().st_size))
        flip(path, bit)
        with pytest.raises(UserError, match=path.name):
            folder.reader("train")
            for part in range(2):
                folder.part("train", part, (0, 30, 60))
        flip(path, bit)


def test_a_part_with_damaged_hashes_is_not_merged(dataset: str, tokenizer_folder: Path) -> None:
    part = str(Path(dataset).parent / PART)
    hashes = DatasetPaths(part).hashes
    options = PlanOptions(drop_duplicates=True, num_shards=2, shard_index=1, chunk_bytes=2000)
    text, other = f"{Path(dataset).parent.parent}/short.txt", f"{dataset}-other/p"
    preprocess(PreprocessOptions([text], str(tokenizer_folder), other, options))
    second = f"{other}.part-0001-of-0002"
    flip(hashes, 100)
    with pytest.raises(UserError, match=f"{hashes}: SHA-256 .* when written: damaged; copy it again"):
        merge([part, second], f"{dataset}-part", 10_000)
    flip(hashes, 100)
    manifest = DatasetPaths(part).manifest
    whole = manifest.read_bytes()
    manifest.write_bytes(sealed(replace(read_manifest(part), hashes=None)))
    with pytest.raises(UserError, match="an earlier version's, without a checksum; write the part again"):
        merge([part, second], f"{dataset}-older", 10_000)
    manifest.write_bytes(whole)
    shutil.rmtree(f"{dataset}-other")


def test_damaged_ids_are_not_trained_on(dataset: str) -> None:
    """Exactly the samples that hold tokens of the damaged block are refused, with its name."""
    shards = open_shards([dataset])
    index = cached_sample_index(shards, SampleRule(64), cache_folder("", [dataset]))
    config = Config(
        model=ModelConfig(vocab_size=2000), data=DataConfig(train=[dataset], seq_length=64, micro_batch_tokens=128)
    )
    path, place = DatasetPaths(dataset).shard(0).bin, BLOCK_BYTES + 1
    flip(path, 8 * place)
    begin, end = (index.start * 2, (index.start + index.length) * 2)
    in_block = (index.shard == 0) & (end > BLOCK_BYTES) & (begin < 2 * BLOCK_BYTES)
    streams, refused = TokenStreams(shards), np.zeros(len(index), np.bool_)
    for sample in range(len(index)):
        one = slice(sample, sample + 1)
        try:
            streams.check(index.shard[one], index.start[one], index.length[one])
        except UserError as error:
            refused[sample] = True
            assert f"{path}: block 1 (bytes 16,384 to 32,768) is damaged" in str(error), error
            assert "copy it again from where it is whole" in str(error)
    assert refused.any() and refused.tolist() == in_block.tolist()
    with pytest.raises(UserError, match="block 1 "):
        merge([dataset], f"{dataset}-merged", 10_000)
    with pytest.raises(UserError, match="block 1 "):
        list(PretrainingData(index, shards, config).evaluation_batches(len(index), 16))
    with pytest.raises(UserError, match="block 1 "):
        count_tokens(shards, 2000)
    flip(path, 8 * place)
    assert merge([dataset], f"{dataset}-merged", 10_000).tokens == sum(len(shard.tokens) for shard in shards)
    list(PretrainingData(index, shards, config).evaluation_batches(len(index), 64))


def test_ids_that_are_only_counted_are_compared(dataset: str) -> None:
    """Where whole words are masked, a rank reads the samples of others, too: for the counts of the step."""
    shards = open_shards([dataset])
    index = cached_sample_index(shards, SampleRule(64), cache_folder("", [dataset]))
    data = DataConfig(train=[dataset], seq_length=64, micro_batch_tokens=64)
    config = Config(model=ModelConfig(vocab_size=2000), data=data, train=TrainConfig(global_batch_size=2))
    whole_words = replace(config, objective=ObjectiveConfig(whole_word_masking=True))
    path = DatasetPaths(dataset).shard(0).bin

    def refused(config: Config, dp_rank: int) -> list[int]:
        starts = np.ones(2000, np.bool_)
        loader = PretrainingData(index, shards, config, dp_rank=dp_rank, dp_size=2, word_starts=starts)
        found = []
        for first in range(0, 400, 2):
            try:
                loader.step_batch(0, first)
            except UserError:
                found.append(first)
        return found

    flip(path, 8 * BLOCK_BYTES + 15)  # an id beyond the vocabulary
    own, counted = ([refused(one, rank) for rank in range(2)] for one in (config, whole_words))
    flip(path, 8 * BLOCK_BYTES + 15)
    assert own[0] != own[1]
    assert counted == [sorted({*own[0], *own[1]})] * 2


def test_blocks_are_compared_once_and_only_those_that_are_read(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    streams = TokenStreams(open_shards([dataset]))
    damages = streams._damages

    def record(number: int, blocks: NDArray[np.int64]) -> list[str]:
        compared.extend((number, block) for block in blocks.tolist())
        return damages(number, blocks)

    monkeypatch.setattr(streams, "_damages", record)
    zero, one, half = np.zeros(1, np.int64), np.ones(1, np.int64), BLOCK_BYTES // 2
    streams.check(zero, zero, one)
    streams.check(zero, zero + 5, one)
    assert compared == [(0, 0)]
    streams.check(np.array([0, 1, 0]), np.array([half - 1, 0, 3]), np.array([half + 2, 1, 1]))
    assert compared == [(0, 0), (0, 1), (0, 2), (1, 0)]
