"""Shards: megatron-core reads them, its builder writes the same bytes, damage is found on opening."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metro_megatron.data.shard_writer import ShardWriter
from metro_megatron.data.shards import Shard, ShardPaths, open_shards
from metro_megatron.data.tokenizer import Tokenizer
from metro_megatron.errors import UserError

DOCUMENTS = [[[7, 8, 9], [10]], [[1999]], [[300] * 40, [5, 6], [11, 12]]]


class WideTokenizer(Tokenizer):
    """A tokenizer folder that claims more ids than uint16 holds."""

    @classmethod
    def from_folder(cls, path: str | Path) -> "WideTokenizer":
        tokenizer = super().from_folder(path)
        tokenizer.vocab_size = 128_000
        return tokenizer  # type: ignore[return-value]


@pytest.fixture(params=[Tokenizer, WideTokenizer], ids=["uint16", "int32"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Tokenizer:
    return request.param.from_folder(tokenizer_folder)


def write(prefix: Path, tokenizer: Tokenizer, documents=DOCUMENTS, **options) -> dict:
    with ShardWriter(str(prefix), tokenizer, **options) as writer:
        for units in documents:
            lengths = np.array([len(unit) for unit in units], np.int32)
            writer.append(np.concatenate(units), lengths, np.array([len(units)]))
        return writer.finish([{"path": "x", "bytes": 1, "sha256": ""}], {"empty": 2})


def test_what_is_written_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write(tmp_path / "new" / "s", tokenizer)
    shard = Shard.open(str(tmp_path / "new" / "s"))
    assert shard.tokens.tolist() == [i for units in DOCUMENTS for unit in units for i in unit]
    assert shard.tokens.dtype == (np.int32 if tokenizer.vocab_size > 65500 else np.uint16)
    assert shard.unit_lengths.tolist() == [3, 1, 1, 40, 2, 2]
    assert shard.unit_lengths.dtype == np.int32
    assert shard.document_index.tolist() == [0, 2, 3, 6]
    assert shard.document_index.dtype == np.int64
    assert shard.manifest == manifest
    assert (manifest["documents"], manifest["units"], manifest["tokens"]) == (3, 6, 49)
    assert Tokenizer.from_folder(shard.tokenizer_path).sha256 == shard.tokenizer_sha256 == tokenizer.sha256
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "s.bin",
        "s.idx",
        "s.manifest.json",
        "s.tokenizer",
    ]


def test_megatron_core_reads_it_and_writes_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    write(tmp_path / "ours", tokenizer)
    dataset = datasets.IndexedDataset(str(tmp_path / "ours"))
    units = [unit for units in DOCUMENTS for unit in units]
    assert len(dataset) == len(units)
    assert [dataset[i].tolist() for i in range(len(units))] == units
    assert dataset.document_indices.tolist() == [0, 2, 3, 6]
    assert dataset.sequence_lengths.tolist() == list(map(len, units))
    dtype = datasets.DType.optimal_dtype(tokenizer.vocab_size)
    builder = datasets.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        flat = [i for unit in document for i in unit]
        builder.add_document(torch.tensor(flat), list(map(len, document)))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["bin", "idx", "manifest.json"])
def test_every_truncation_is_found_on_opening(tmp_path: Path, tokenizer: Tokenizer, ending: str) -> None:
    write(tmp_path / "s", tokenizer)
    path = tmp_path / f"s.{ending}"
    whole = path.read_bytes()
    for size in {*range(0, len(whole) - 1, 1 if len(whole) < 300 else 23), len(whole) - 2}:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"s.{ending}"):
            Shard.open(str(tmp_path / "s"))
    path.unlink()
    with pytest.raises(UserError, match=f"s.{ending}"):
        Shard.open(str(tmp_path / "s"))


def test_a_manifest_that_agrees_with_the_damage_does_not_hide_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path / "s", tokenizer)
    paths = ShardPaths(str(tmp_path / "s"))
    manifest, idx, content = (
        json.loads(paths.manifest.read_text()),
        paths.idx.read_bytes(),
        paths.bin.read_bytes(),
    )
    changes = [
        ("bin", content[:-2]),
        ("bin", content + b"\0\0"),
        ("idx", idx[:-8]),
        ("idx", b"MMIDIDX\0\1" + idx[9:]),
        ("idx", idx[:9] + b"\2" + idx[10:]),
        ("idx", idx[:17] + b"\6" + idx[18:]),
        ("idx", idx[:18] + b"\7" + idx[19:]),
        ("idx", idx[:-8] + (7).to_bytes(8, "little")),
        ("idx", idx[:34] + idx[38:58] + idx[34:38] + idx[58:-8] + (0).to_bytes(8, "little")),
    ]
    for name, changed in changes:
        paths.bin.write_bytes(changed if name == "bin" else content)
        paths.idx.write_bytes(changed if name == "idx" else idx)
        for each in ("bin", "idx"):
            manifest["files"][each]["bytes"] = (tmp_path / f"s.{each}").stat().st_size
        paths.manifest.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"s\.{name}"):
            Shard.open(paths.prefix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "format_version None"),
        ('{"format_version": 2}', "format_version 2"),
        ('{"format_version": 1}', "no usable tokenizer_sha256, vocab_size"),
        ("[" * 200_000, "damaged"),
        ("\xff", "damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, tokenizer_folder: Path, content: str, message: str) -> None:
    write(tmp_path / "s", Tokenizer.from_folder(tokenizer_folder))
    (tmp_path / "s.manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        Shard.open(str(tmp_path / "s"))


def test_shards_must_share_their_tokenizer_and_all_problems_are_told(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    for number in range(3):
        write(tmp_path / f"s{number}", Tokenizer.from_folder(tokenizer_folder))
    prefixes = [str(tmp_path / f"s{number}") for number in range(3)]
    assert [len(shard.tokens) for shard in open_shards(prefixes)] == [49] * 3
    manifest = json.loads((tmp_path / "s1.manifest.json").read_text())
    (tmp_path / "s1.manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "f" * 64}))
    with pytest.raises(UserError) as refused:
        open_shards([*prefixes, str(tmp_path / "none")])
    assert len(refused.value.problems) == 2
    assert "no such shard" in refused.value.problems[0]
    assert "preprocess both with one tokenizer" in refused.value.problems[1]
    with pytest.raises(UserError, match="no shards"):
        open_shards([])


def test_an_interrupted_writer_leaves_nothing_and_harms_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def interrupt(prefix: Path) -> None:
        with pytest.raises(KeyboardInterrupt), ShardWriter(str(prefix), tokenizer, overwrite=True) as writer:
            writer.append(np.arange(5), np.array([5], np.int32), np.array([1]))
            raise KeyboardInterrupt

    interrupt(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "s", tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    interrupt(tmp_path / "s")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_existing_outputs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "s", tokenizer)
    with pytest.raises(UserError, match="a finished shard is there already.*--overwrite"):
        write(tmp_path / "s", tokenizer)
    write(tmp_path / "s", tokenizer, DOCUMENTS[:1], overwrite=True)
    assert len(Shard.open(str(tmp_path / "s")).tokens) == 4
    (tmp_path / "foreign.idx").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"foreign\.idx is there already"):
        write(tmp_path / "foreign", tokenizer)
    assert (tmp_path / "foreign.idx").read_bytes() == b"precious"
    for prefix in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(UserError, match="names a folder"):
            ShardWriter(str(prefix), tokenizer)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "s", tokenizer)


def test_two_writers_of_one_prefix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(str(tmp_path / "s"), tokenizer) as first:
        first.append(np.arange(5), np.array([5], np.int32), np.array([1]))
        with pytest.raises(UserError, match="another process"):
            write(tmp_path / "s", tokenizer)
        first.finish([], {})
    assert Shard.open(str(tmp_path / "s")).tokens.tolist() == [0, 1, 2, 3, 4]


NO_ROOM = """
import resource, sys
import numpy as np
from metro_megatron.data.shard_writer import ShardWriter
from metro_megatron.data.tokenizer import Tokenizer
from metro_megatron.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    with ShardWriter(sys.argv[1], Tokenizer.from_folder(sys.argv[2]), True, lambda: 0.25) as writer:
        for _ in range(100):
            writer.append(np.zeros(10_000, int), np.array([10_000], np.int32), np.array([1]))
except UserError as error:
    sys.exit(str(error))
"""


def test_no_room_on_the_disk(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The kernel refuses to let a file grow: as a full disk, without one."""
    write(tmp_path / "s", Tokenizer.from_folder(tokenizer_folder))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", NO_ROOM, str(tmp_path / "s"), str(tokenizer_folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the shard needs about 1.2 MB" in result.stderr and "MB free" in result.stderr
    assert os.strerror(errno.EFBIG) in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert len(Shard.open(str(tmp_path / "s")).tokens) == 49
