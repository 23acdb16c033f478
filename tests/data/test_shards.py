"""Datasets: megatron-core reads their shards, its builder writes the same bytes, damage is found on opening."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metro_megatron.data.manifest import DatasetPaths, Manifest, ShardContent, ShardEntry, shard_suffix
from metro_megatron.data.records import plain, to_json
from metro_megatron.data.shards import open_shards, token_dtype
from metro_megatron.errors import UserError
from metro_megatron.preprocess.assembly import shard_writer
from metro_megatron.preprocess.merging import merge
from metro_megatron.vocabulary import SpecialIds

DOCUMENTS = [[[7, 8, 9], [10]], [[1999]], [[300] * 40, [5, 6], [11, 12]]]
UINT16, INT32 = 2000, 128_000


def write_shard(prefix: Path, vocab_size: int, documents=DOCUMENTS) -> ShardContent:
    with shard_writer(str(prefix), token_dtype(vocab_size)) as writer:
        for units in documents:
            lengths = np.array([len(unit) for unit in units], np.int32)
            writer.append((np.array(unit) for unit in units), lengths, np.array([len(units)]))
        return writer.finish()


def write(prefix: Path, vocab_size: int = UINT16, shards=(DOCUMENTS,), tokenizer: str = "a" * 64) -> Manifest:
    """A dataset without its tokenizer folder."""
    entries = tuple(
        ShardEntry(shard_suffix(i), **vars(write_shard(Path(f"{prefix}{shard_suffix(i)}"), vocab_size, documents)))
        for i, documents in enumerate(shards)
    )
    manifest = Manifest(
        format_version=2,
        tokenizer_sha256=tokenizer,
        vocab_size=vocab_size,
        shard_bytes=10**9,
        shard_index=0,
        num_shards=1,
        has_pending_duplicates=False,
        documents=sum(entry.documents for entry in entries),
        units=sum(entry.units for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        rejects={},
        dropped={},
        sources=(),
        shards=entries,
    )
    DatasetPaths(str(prefix)).manifest.write_bytes(to_json(manifest))
    return manifest


@pytest.fixture(params=[UINT16, INT32], ids=["uint16", "int32"])
def vocab_size(request: pytest.FixtureRequest) -> Iterator[int]:
    return request.param


def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    manifest = write(tmp_path / "s", vocab_size, (DOCUMENTS, DOCUMENTS[:1]))
    first, second = open_shards([str(tmp_path / "s")])
    assert first.tokens.tolist() == [i for units in DOCUMENTS for unit in units for i in unit]
    assert first.tokens.dtype == (np.int32 if vocab_size > 65500 else np.uint16)
    assert first.unit_lengths.tolist() == [3, 1, 1, 40, 2, 2]
    assert first.unit_lengths.dtype == np.int32 and first.document_index.dtype == np.int64
    assert first.document_index.tolist() == [0, 2, 3, 6]
    assert second.tokens.tolist() == [7, 8, 9, 10]
    assert [(shard.number, shard.first_document) for shard in (first, second)] == [(0, 0), (1, 3)]
    assert (second.manifest, second.vocab_size) == (manifest, vocab_size)
    assert second.sha256 == manifest.shards[1].bin.sha256
    assert second.tokenizer_path == tmp_path / "s.tokenizer"


def test_megatron_core_reads_it_and_writes_the_same_bytes(tmp_path: Path, vocab_size: int) -> None:
    datasets = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    write_shard(tmp_path / "ours", vocab_size)
    dataset = datasets.IndexedDataset(str(tmp_path / "ours"))
    units = [unit for units in DOCUMENTS for unit in units]
    assert [dataset[i].tolist() for i in range(len(dataset))] == units
    assert dataset.document_indices.tolist() == [0, 2, 3, 6]
    dtype = datasets.DType.optimal_dtype(vocab_size)
    builder = datasets.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        flat = [i for unit in document for i in unit]
        builder.add_document(torch.tensor(flat), list(map(len, document)))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["_00000.bin", "_00001.idx", ".manifest.json"])
def test_truncations_and_what_is_no_file_are_found_on_opening(tmp_path: Path, vocab_size: int, ending: str) -> None:
    write(tmp_path / "s", vocab_size, (DOCUMENTS, DOCUMENTS))
    path = tmp_path / f"s{ending}"
    whole = path.read_bytes()
    for size in {*range(0, len(whole) - 1, 1 if len(whole) < 300 else 23), len(whole) - 2}:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"s{ending}"):
            open_shards([str(tmp_path / "s")])
    path.unlink()
    with pytest.raises(UserError, match=f"s{ending}"):
        open_shards([str(tmp_path / "s")])
    os.mkfifo(path)  # nobody will write into it
    with pytest.raises(UserError, match=rf"s{ending}: cannot be read \(a pipe, a socket or a device\)"):
        open_shards([str(tmp_path / "s")])


def test_a_manifest_that_agrees_with_the_damage_does_not_hide_it(tmp_path: Path, vocab_size: int) -> None:
    manifest = plain(write(tmp_path / "s", vocab_size))
    paths = DatasetPaths(str(tmp_path / "s"))
    idx, content = paths.shard(0).idx.read_bytes(), paths.shard(0).bin.read_bytes()
    changes = [
        ("bin", content[:-2]),
        ("bin", content + b"\0\0"),
        ("idx", idx[:-8]),
        ("idx", b"MMIDIDX\0\1" + idx[9:]),
        ("idx", idx[:9] + b"\2" + idx[10:]),
        ("idx", idx[:17] + b"\6" + idx[18:]),
        ("idx", idx[:18] + b"\7" + idx[19:]),
        ("idx", idx[:-8] + (7).to_bytes(8, "little")),
    ]
    for name, changed in changes:
        paths.shard(0).bin.write_bytes(changed if name == "bin" else content)
        paths.shard(0).idx.write_bytes(changed if name == "idx" else idx)
        for each in ("bin", "idx"):
            manifest["shards"][0][each]["bytes"] = (tmp_path / f"s_00000.{each}").stat().st_size
        paths.manifest.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"s_00000\.{name}"):
            open_shards([paths.prefix])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "format_version None"),
        ('{"format_version": 1}', "format_version 1"),
        ('{"format_version": 2}', "no usable tokenizer_sha256, vocab_size"),
        ("[" * 200_000, "damaged"),
        ("\xff", "damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        open_shards([str(tmp_path / "s")])


def test_a_shard_cannot_be_named_out_of_its_folder(tmp_path: Path) -> None:
    manifest = plain(write(tmp_path / "s"))
    manifest["shards"][0]["name"] = "/../../etc/passwd"
    (tmp_path / "s.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no usable shards"):
        open_shards([str(tmp_path / "s")])


def test_datasets_must_share_their_tokenizer_and_all_problems_are_told(tmp_path: Path) -> None:
    prefixes = [str(tmp_path / f"s{number}") for number in range(3)]
    for prefix in prefixes:
        write(Path(prefix))
    assert [len(shard.tokens) for shard in open_shards(prefixes)] == [49] * 3
    write(Path(prefixes[1]), tokenizer="f" * 64)
    with pytest.raises(UserError) as refused:
        open_shards([*prefixes, str(tmp_path / "none")])
    assert len(refused.value.problems) == 2
    assert "no such dataset" in refused.value.problems[0]
    assert "preprocess both with one tokenizer" in refused.value.problems[1]
    with pytest.raises(UserError, match="no shards"):
        open_shards([])


def test_the_same_ids_under_other_special_ids_are_not_joined(tmp_path: Path) -> None:
    """As `tokenizer_config.json` beside one and the same `tokenizer.json` may say."""
    prefixes = [str(tmp_path / name) for name in "ab"]
    write(Path(prefixes[0]))
    other = replace(write(Path(prefixes[1]), shards=(DOCUMENTS[:1],)), special_ids=SpecialIds(bos=2, eos=0))
    DatasetPaths(prefixes[1]).manifest.write_bytes(to_json(other))
    for action in (open_shards, lambda prefixes: merge(prefixes, str(tmp_path / "m"), 10**6)):
        with pytest.raises(UserError, match=r"b has tokenizer .* \(SpecialIds\(bos=2, .*a has .*preprocess both"):
            action(prefixes)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), shard_writer(str(tmp_path / "s"), np.dtype(np.uint16)) as writer:
        writer.append([np.arange(5)], np.array([5], np.int32), np.array([1]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
