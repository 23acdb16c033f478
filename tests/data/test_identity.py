"""Datasets are told apart, and documents held out, by what they hold: never by names, places or order."""

import gzip
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from metro_megatron.commands.preprocess_data import describe
from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, DataConfig, TrainConfig
from metro_megatron.data.documents import TokenizedDocuments
from metro_megatron.data.identity import open_datasets, repeated_files, shared
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.data.mapping import mapped
from metro_megatron.data.records import to_json
from metro_megatron.data.samples import SampleIndex, SampleRule, build_sample_index, sample_blocks, sample_indices
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.preprocess.merging import merge
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess
from metro_megatron.randomness import Purpose, uniform
from metro_megatron.train.corpus import Corpus
from tests.parity.small_run import MemoryShard, memory_shard

FRACTION = 0.2


@pytest.fixture(scope="module")
def folder(reviews: list[list[str]], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets a and b, which share some documents but no file, ab that is both, and copies of a."""
    folder = tmp_path_factory.mktemp("identity")
    for name, documents in (("a", reviews[:120]), ("b", [*reviews[120:160], *reviews[:20]])):
        (folder / f"{name}.txt").write_text("\n\n".join("\n".join(document) for document in documents))
        plan = PlanOptions(shard_bytes=20_000)
        preprocess(PreprocessOptions([str(folder / f"{name}.txt")], str(tokenizer_folder), str(folder / name), plan))
    merge([str(folder / "a"), str(folder / "b")], str(folder / "ab"), 30_000)
    (folder / "link").symlink_to(folder)
    (folder / "elsewhere").mkdir()
    for path in folder.glob("a[._]*"):
        name = folder / "elsewhere" / path.name.replace("a", "c", 1)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, name)
    return folder


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["a", "a"], [], "data.train: a and a are the same dataset .by their hashes.; name one of them"),
        (["a", "./a"], [], r"data.train: a and \./a are the same dataset"),
        (["link/a", "b", "a"], [], "data.train: link/a and a are the same dataset"),
        (["a", "b", "elsewhere/c"], [], "data.train: a and elsewhere/c are the same dataset"),
        (["ab", "b"], [], "data.train: ab and b were made of the same files"),
        (["b", "a"], ["elsewhere/c"], "data.validation: elsewhere/c and a of data.train are the same dataset"),
        (["a"], ["ab"], "data.validation: ab and a of data.train were made of the same files"),
        (["a"], ["b", "b"], "data.validation: b and b are the same dataset"),
    ],
)
def test_datasets_that_share_documents_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, train: list[str], validation: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as refused:
        open_datasets(train, validation)
    assert len(refused.value.problems) == 1


def test_texts_are_known_however_they_were_cut(
    folder: Path, reviews: list[list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Into chunks, shards, files and units, in what form and order they lie, and what was left out of them then."""
    texts = ["\n".join(document) for document in reviews[:120]]
    records = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "half.jsonl").write_text("".join(records[:60]))
    (tmp_path / "rest.jsonl.gz").write_bytes(gzip.compress("".join(records[60:][::-1]).encode()))
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    (tmp_path / "other.txt").write_text("\n\n".join(["\n".join(document) for document in reviews[200:210]]))
    cut = PlanOptions(chunk_bytes=9_000, shard_bytes=30_000)
    for name, files, plan in (
        ("again", [folder / "a.txt"], cut),
        ("halves", [tmp_path / "half.jsonl", tmp_path / "rest.jsonl.gz"], cut),
        ("array", [tmp_path / "array.json"], replace(cut, unit="sentence", min_tokens=30)),
        (
            "more",
            [tmp_path / "array.json", tmp_path / "other.txt"],
            replace(cut, unit="document", drop_duplicates=True),
        ),
        ("half", [tmp_path / "half.jsonl"], replace(cut, chunk_bytes=7_000, shard_bytes=20_000)),
    ):
        preprocess(
            PreprocessOptions(list(map(str, files)), str(tokenizer_folder), str(tmp_path / name), plan, workers=1)
        )
    refused = [("again", "a"), ("halves", "a"), ("array", "a"), ("more", "a"), ("half", "halves")]
    for one, other in refused:
        names = [str((folder if name == "a" else tmp_path) / name) for name in (one, other)]
        with pytest.raises(UserError, match=f"{one} and .*{other} were made of the same texts"):
            open_datasets(names)
        with pytest.raises(UserError, match="so that what is trained on would be evaluated on"):
            open_datasets(names[:1], names[1:])
    open_datasets([str(tmp_path / "half"), str(folder / "b")])
    manifest = read_manifest(str(folder / "a"))
    (source,) = manifest.sources
    unknown = replace(source, files=tuple(replace(file, texts=None) for file in source.files))
    DatasetPaths(str(tmp_path / "again")).manifest.write_bytes(to_json(replace(manifest, sources=(unknown,))))
    earlier = read_manifest(str(tmp_path / "again"))
    assert list(shared([earlier, read_manifest(str(tmp_path / "array"))])) == [], "earlier versions' know no texts"
    assert [(one, other) for one, other, _ in shared([earlier, manifest])] == [(0, 1)]


def test_a_file_beside_those_that_it_was_joined_of(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    one, other = ((folder / f"{name}.txt").read_text() for name in "ab")
    (tmp_path / "joined.txt").write_text(f"{other}\n\n{one}")
    (tmp_path / "copy.txt").write_text(one.replace("\n", "\r\n"))
    whole, joined = str(tmp_path / "whole"), str(tmp_path / "joined")
    (summary,) = preprocess(PreprocessOptions([f"{joined}.txt"], str(tokenizer_folder), joined))
    assert not repeated_files(summary.manifest)
    parts = [str(folder / name) for name in "ab"]
    with pytest.raises(UserError, match=f"{parts[0]} and {joined} were made of the same texts") as refused:
        open_datasets([*parts, joined])
    assert len(refused.value.problems) == 2
    files = [*(f"{part}.txt" for part in parts), f"{joined}.txt", f"{tmp_path}/copy.txt"]
    (summary,) = preprocess(PreprocessOptions(files, str(tokenizer_folder), whole))
    assert sorted(sorted(re.findall(r"(\w+)[.]txt", line)) for line in repeated_files(summary.manifest)) == [
        ["a", "b", "joined"],
        ["a", "copy"],
    ]
    assert describe(summary, 1.0).count("given twice") == 2


def texts(shards: Sequence[TokenizedDocuments], index: SampleIndex) -> set[tuple[int, ...]]:
    places = zip(index.shard.tolist(), index.start.tolist(), index.length.tolist(), strict=True)
    return {tuple(shards[shard].tokens[start : start + length].tolist()) for shard, start, length in places}


def test_no_order_of_the_list_trains_on_what_another_holds_out(folder: Path, tmp_path: Path) -> None:
    """Nor do merged datasets, or documents that two datasets share."""
    held_out = {}
    for names in (("a", "b"), ("b", "a"), ("a",), ("ab",)):
        prefixes = [str(folder / name) for name in names]
        data = DataConfig(train=prefixes, validation_fraction=FRACTION, seq_length=512, index_cache=str(tmp_path))
        shards, _ = open_datasets(prefixes)
        train, validation = sample_indices(data, shards)
        assert validation is not None
        held_out[names] = texts(shards, validation)
        assert held_out[names] and not held_out[names] & texts(shards, train)
    assert held_out["a", "b"] == held_out["b", "a"] == held_out[("ab",)] > held_out[("a",)]


def test_runs_of_earlier_releases_hold_out_by_place(folder: Path) -> None:
    shards = open_shards([str(folder / "b"), str(folder / "a")])
    rule = SampleRule(100_000, "validation", FRACTION, "place")
    index = build_sample_index(shards, 100_000, rule.split, FRACTION, rule.held_out_by)
    expected = []
    for source, name in enumerate(("b", "a")):
        (whole,) = {shard.manifest.documents for shard in shards if shard.dataset == str(folder / name)}
        expected += [(source, number) for number in range(whole) if uniform(Purpose.SPLIT, source, number) < FRACTION]
    found = []
    for shard, start in zip(index.shard.tolist(), index.start, strict=True):
        document, _ = shards[shard].documents_of(np.array([start]))
        found.append((int(shards[shard].dataset == str(folder / "a")), int(document[0])))
    assert found == expected and expected


def test_documents_are_held_out_by_their_ids_alone() -> None:
    """Whatever the ids are stored in, however units are cut, and wherever the document stands."""
    documents = [[[number, number + 1, 7], [9, number]] for number in range(300)]
    wide = TokenizedDocuments.from_units(documents)
    narrow = TokenizedDocuments(wide.tokens.astype(np.uint16), wide.unit_lengths, wide.document_index)
    joined = TokenizedDocuments.from_units([[sum(document, [])] for document in documents[::-1]])
    found = [texts([one], build_sample_index([one], 64, "validation", FRACTION)) for one in (wide, narrow, joined)]
    assert found[0] == found[1] == found[2] and 30 < len(found[0]) < 90
    empty = TokenizedDocuments.from_units([[[], []], []])
    assert not any(len(block.start) for block in islice(sample_blocks([empty], SampleRule(64, "train", FRACTION)), 1))


def test_a_resumed_run_names_what_changed(folder: Path) -> None:
    def corpus(shards: Sequence[object]) -> Corpus:
        return Corpus(Config(), list(shards), SampleIndex(*[np.empty(0)] * 3, (0, 0), 0, 512), [], None)  # type: ignore[arg-type]

    run = corpus(open_shards([str(folder / "a")]))
    assert run.changed_shards(run.fingerprint, run.index_fingerprint) == []
    assert run.changed_shards(run.fingerprint, None) == [], "earlier releases' checkpoints know the ids alone"
    other = [*run.index_fingerprint[:1], "0" * 64, *run.index_fingerprint[2:]]
    (line,) = run.changed_shards(run.fingerprint, other)
    assert line.startswith(f"{folder}/a_00001.idx has SHA-256") and "was 000000000000" in line
    count = len(run.fingerprint)
    backwards = run.changed_shards(run.fingerprint[::-1], run.index_fingerprint[::-1])
    assert backwards == ["the same shards in another order"]
    assert run.changed_shards(run.fingerprint[1:], None) == [f"{count} shards, were {count - 1}"]


def test_a_cache_of_replacements_is_of_the_same_held_out_documents() -> None:
    """Also where nothing is evaluated, as what is held out is not trained on."""
    shard: MemoryShard = memory_shard(seed=1)
    index = build_sample_index([shard], 512)  # type: ignore[list-item]
    plans = {}
    for by, fraction in (("content", 0.1), ("content", 0.2), ("place", 0.1), ("content", 0.0)):
        config = replace(Config(), data=DataConfig(validation_fraction=fraction, held_out_by=by))  # type: ignore[arg-type]
        plans[by, fraction] = Corpus(config, [shard], index, [], None).cache_plan("")  # type: ignore[list-item]
    mine = plans["content", 0.1]
    assert mine.differences(mine) == [] and plans["place", 0.1].differences(plans["content", 0.0]) == []
    for other in (("content", 0.2), ("place", 0.1), ("content", 0.0)):
        assert [line.split(" is ")[0] for line in mine.differences(plans[other])] == ["validation"]


def test_an_absurd_number_of_epochs_is_said() -> None:
    shard: MemoryShard = memory_shard(seed=1)
    index = build_sample_index([shard], 512)  # type: ignore[list-item]
    corpus = Corpus(Config(), [], index, [], None)
    (epochs,) = corpus.epochs
    assert f"reads the {len(index):,} samples {epochs:,.0f} times" in (corpus.advice or "")
    assert replace(corpus, train_index=replace(index, content_tokens=10**12)).advice is None


def test_epochs_are_those_of_each_source_in_all_phases() -> None:
    """Of a small source that a late phase reads alone, the run as a whole says little."""
    shards = [replace(memory_shard(seed, count), dataset=str(seed)) for seed, count in ((1, 400), (2, 40))]
    index, shorter = (build_sample_index(shards, length) for length in (512, 32))  # type: ignore[arg-type]
    many, few = np.diff(index.source_bounds).tolist()
    phase = Phase(start=100, seq_length=32, weights=[0.0, 1.0])
    train = TrainConfig(train_steps=110, global_batch_size=10 * few, phases=[phase])
    data = DataConfig(train=["many", "few"], weights=[3.0, 1.0], seq_length=512)
    corpus = Corpus(Config(data=data, train=train), [], index, [], None, [shorter])
    short = int(np.diff(shorter.source_bounds)[1])
    assert corpus.epochs == pytest.approx([750 * few / many, 250 + 10 * 10 * few / short], rel=1e-6)
    resting = replace(corpus, config=replace(corpus.config, data=replace(data, weights=[0.0, 1.0])))
    assert resting.advice == "many: no phase reads it, its weights are all 0; give it one, or leave it out"
    longer = replace(corpus, config=replace(corpus.config, train=replace(train, train_steps=2000)))
    assert f"reads the {few:,} samples of few {longer.epochs[1]:,.0f} times" in (longer.advice or "")


def test_the_near_prefix_is_named(folder: Path) -> None:
    for given, near in (
        ("a.manifest.json", "did you mean {}/a[?]"),
        ("a_00000.bin", "did you mean {}/a[?]"),
        ("elsewhere/", "did you mean {}/elsewhere/c[?]"),
        ("abb", "did you mean {}/ab[?]"),
        ("ab*", "did you mean {}/ab[?]"),
        ("none", "there is no such dataset; write"),
    ):
        with pytest.raises(UserError, match=near.format(folder)):
            open_datasets([f"{folder}/{given}"])


def test_files_are_mapped_without_descriptors(tmp_path: Path) -> None:
    stored = np.arange(1000, dtype=np.uint16)
    for number in range(50):
        stored.tofile(tmp_path / f"{number}.bin")
    (tmp_path / "empty.bin").touch()
    before, maps = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps")
    arrays = [mapped(tmp_path / f"{number}.bin", np.dtype(np.uint16)) for number in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before and maps.read_text().count(str(tmp_path)) == 50
    tokens = arrays[3][5:]
    del arrays
    assert np.array_equal(tokens, stored[5:]) and not tokens.flags.writeable
    assert maps.read_text().count(str(tmp_path)) == 1
    del tokens
    assert maps.read_text().count(str(tmp_path)) == 0
    assert mapped(tmp_path / "empty.bin", np.dtype(np.uint16)).tolist() == []
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "none.bin", np.dtype(np.uint16))
