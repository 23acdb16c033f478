"""Damage of every kind is found by reading a dataset through; nothing else is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metro_megatron.commands.inspect_data as tool
from metro_megatron.cli.command_line import exit_code
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.data.records import SEAL
from metro_megatron.data.shards import INDEX_HEADER, open_shards
from metro_megatron.errors import UserError
from metro_megatron.inspection.index_check import REMEDY
from metro_megatron.inspection.verification import verify
from metro_megatron.preprocess.merging import merge
from tests.data.test_shards import INT32, write
from tests.data.two_sources import write_two_sources


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reviews: list[list[str]], tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_two_sources(folder, reviews, tokenizer_folder)
    return folder


@pytest.fixture
def prefix(whole: Path, tmp_path: Path) -> str:
    """A copy to damage."""
    for path in whole.glob("d[._]*"):
        target = tmp_path / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return str(tmp_path / "d")


def problems(prefix: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        verify(prefix)
    return refused.value.problems


def change_manifest(prefix: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = DatasetPaths(prefix).manifest
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest.pop(SEAL, None)
    path.write_text(json.dumps(manifest))


def agree(prefix: str, number: int) -> None:
    """Make the manifest say the sizes and hashes that a shard's damaged files have."""

    def change(manifest: dict[str, Any]) -> None:
        paths = DatasetPaths(prefix).shard(number)
        for name, path in (("bin", paths.bin), ("idx", paths.idx)):
            content = path.read_bytes()
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["shards"][number][name] = entry

    change_manifest(prefix, change)


def test_a_whole_dataset_is_read_to_the_last_byte(prefix: str, capsys: pytest.CaptureFixture) -> None:
    read: list[int] = []
    verified = verify(prefix, read.append)
    files = [path for path in Path(prefix).parent.iterdir() if path.suffix in (".bin", ".idx", ".crc")]
    assert verified.num_files == len(files) >= 9
    assert verified.num_bytes == sum(read) == sum(path.stat().st_size for path in files)
    tool.main(tool.Options([prefix], verify=True))
    printed = capsys.readouterr().out
    assert f"{prefix} is whole" in printed and "500 documents" in printed and "MB/s" in printed


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_one_flipped_bit_anywhere(prefix: str, ending: str) -> None:
    path = Path(f"{prefix}_00001.{ending}")
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert f"{path}: SHA-256 " in problems(prefix)[0]
        content[place] ^= 1
    path.write_bytes(content)
    verify(prefix)


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("size", [0, 30, -1])
def test_cut_files(prefix: str, ending: str, size: int) -> None:
    path = Path(f"{prefix}_00002.{ending}")
    content = path.read_bytes()
    path.write_bytes(content[:size])
    (problem,) = problems(prefix)
    assert problem.startswith(f"{path}: {len(content[:size]):,} bytes, the manifest says {len(content):,}")


def test_missing_swapped_and_stray_shards_are_all_told(prefix: str, capsys: pytest.CaptureFixture) -> None:
    shards = len(json.loads(DatasetPaths(prefix).manifest.read_text())["shards"])
    first, second, third = (DatasetPaths(prefix).shard(number) for number in range(3))
    kept = first.bin.read_bytes()
    first.bin.write_bytes(second.bin.read_bytes())
    second.bin.write_bytes(kept)
    third.idx.unlink()
    stray = DatasetPaths(prefix).shard(shards).bin
    stray.write_bytes(b"")
    found = problems(prefix)
    assert "the content of shard _00001, files are swapped" in found[0] and str(first.bin) in found[0]
    assert "the content of shard _00000, files are swapped" in found[1] and str(second.bin) in found[1]
    assert found[2].startswith(f"{third.idx}: no such file") and str(stray) in found[3] and len(found) == 4
    assert exit_code(lambda: tool.main(tool.Options([prefix, f"{prefix}-none"], verify=True))) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1].endswith(
        "write it with tools/preprocess_data.py"
    )


@pytest.mark.parametrize("wrong", [0, 4, 2000, 65_535])
def test_ids_that_no_text_has(prefix: str, wrong: int) -> None:
    path = DatasetPaths(prefix).shard(1).bin
    ids = np.fromfile(path, "<u2")
    ids[[7, -1]] = wrong
    ids.tofile(path)
    agree(prefix, 1)
    said = f"{path}: 2 ids that no text of 2,000 ids has, the first is {wrong} at token 7;"
    assert problems(prefix)[0].startswith(said)


def damage_index(prefix: str, number: int, section: str, place: int, value: int) -> Path:
    """Put `value` at `place` of the lengths, offsets or documents of a shard."""
    path = DatasetPaths(prefix).shard(number).idx
    content = bytearray(path.read_bytes())
    units, boundaries = INDEX_HEADER.unpack(content[: INDEX_HEADER.size])[3:]
    sizes = {"lengths": (4, units), "offsets": (8, units), "documents": (8, boundaries)}
    begin = INDEX_HEADER.size
    for name, (itemsize, count) in sizes.items():
        if name == section:
            begin += itemsize * (place % count)
            content[begin : begin + itemsize] = value.to_bytes(itemsize, "little", signed=True)
            break
        begin += itemsize * count
    path.write_bytes(content)
    agree(prefix, number)
    return path


@pytest.mark.parametrize(
    ("section", "place", "value", "message"),
    [
        ("lengths", 5, 0, "unit 5 has length 0"),
        ("lengths", 5, -3, "unit 5 has length -3"),
        ("lengths", 0, 1_000_000, "unit 1 begins at byte"),
        ("lengths", -1, 1_000_000, "the manifest says"),
        ("offsets", 0, 2, "unit 0 begins at byte 2, must at 0"),
        ("offsets", 9, -8, "unit 9 begins at byte -8"),
        ("documents", 0, 1, "the first document begins at unit 1"),
        ("documents", 4, 0, "document 3 ends at unit 0"),
        ("documents", 3, 1 << 40, "document 3 ends at unit"),
        ("documents", -1, 1 << 40, "the last document ends at unit"),
    ],
)
def test_indices_that_contradict_themselves(prefix: str, section: str, place: int, value: int, message: str) -> None:
    path = damage_index(prefix, 1, section, place, value)
    assert problems(prefix)[0].startswith(f"{path}: ") and message in problems(prefix)[0]


def test_headers_and_a_boundary_that_is_only_elsewhere(prefix: str) -> None:
    path = DatasetPaths(prefix).shard(1).idx
    content = path.read_bytes()
    for begin, changed in ((0, b"X"), (9, b"\2"), (17, b"\4"), (18, b"\0"), (26, b"\0")):
        path.write_bytes(content[:begin] + changed + content[begin + 1 :])
        agree(prefix, 1)
        assert problems(prefix)[0].startswith(f"{path}: "), begin
    path.write_bytes(content)
    units, boundaries = INDEX_HEADER.unpack(content[: INDEX_HEADER.size])[3:]
    documents = np.frombuffer(content, "<i8", boundaries, INDEX_HEADER.size + 12 * units)
    movable = next(d for d in range(1, boundaries - 1) if documents[d + 1] - documents[d] > 1)
    damage_index(prefix, 1, "documents", movable, int(documents[movable]) + 1)
    (problem,) = problems(prefix)
    assert "source 0 (long): document_lengths are not those of its documents" in problem


@pytest.mark.parametrize("name", ["documents", "units", "tokens"])
def test_counts_that_do_not_add_up(prefix: str, name: str) -> None:
    manifest = json.loads(DatasetPaths(prefix).manifest.read_text())
    for where, expected in (
        (lambda manifest: manifest, ["its shards add up", "its sources add up"]),
        (lambda manifest: manifest["sources"][1], [f"{name}, but its sources add up"]),
        (lambda manifest: manifest["shards"][1], [f"{name}, but its shards add up"]),
    ):
        change_manifest(prefix, lambda manifest, where=where: where(manifest).update({name: where(manifest)[name] + 1}))
        found = "\n".join(problems(prefix))
        assert all(text in found for text in expected), found
        DatasetPaths(prefix).manifest.write_text(json.dumps(manifest))
    change_manifest(prefix, lambda manifest: manifest["sources"][0].update({name: manifest["sources"][0][name] - 1}))
    change_manifest(prefix, lambda manifest: manifest["sources"][1].update({name: manifest["sources"][1][name] + 1}))
    assert "source 0" in problems(prefix)[0]


@pytest.mark.parametrize("source", [{}, [], {"documents": "many"}, None])
def test_damaged_sources_are_no_crash(prefix: str, source: object) -> None:
    change_manifest(prefix, lambda manifest: manifest["sources"].__setitem__(0, source))
    assert "source 0 is damaged" in problems(prefix)[0]


def test_another_tokenizer(prefix: str, tokenizer_folder: Path) -> None:
    change_manifest(prefix, lambda manifest: manifest.update(tokenizer_sha256="0" * 64))
    assert "not the tokenizer of these shards" in problems(prefix)[0]
    shutil.rmtree(DatasetPaths(prefix).tokenizer)
    assert all("cannot be read (No such file" in problem for problem in problems(prefix)) and len(problems(prefix)) >= 3


def test_ids_of_a_large_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "s", INT32, [[[[7, 127_999, 128_000, 9]], [[-1, 5]]], [[[1999]]]])
    found = problems(str(tmp_path / "s"))
    assert [one for one in found if "_0000" in one] == [
        f"{tmp_path}/s_00000.bin: 2 ids that no text of 128,000 ids has, the first is 128000 at token 2; {REMEDY}"
    ]


def test_a_dataset_of_an_earlier_version_gets_its_checksums(prefix: str, capsys: pytest.CaptureFixture) -> None:
    paths, whole = DatasetPaths(prefix), read_manifest(prefix)
    before = {path: path.read_bytes() for path in (*paths.shard(0).files, *paths.shard(1).files, paths.manifest)}

    def forget(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 2
        del manifest["tokenizer_files"]
        for number, shard in enumerate(manifest["shards"]):
            del shard["crc"]
            paths.shard(number).crc.unlink()

    change_manifest(prefix, forget)
    assert [shard.checksums for shard in open_shards([prefix])] == [None] * len(whole.shards)
    tool.main(tool.Options([prefix], verify=True))
    assert "have no checksums; --add_checksums writes them" in capsys.readouterr().out
    path = paths.shard(1).bin
    path.write_bytes(b"\0" + before[path][1:])
    with pytest.raises(UserError, match=f"{path}: SHA-256 "):
        tool.main(tool.Options([prefix], add_checksums=True))
    with pytest.raises(UserError, match=f"{path}: SHA-256 "):  # else damage would get checksums there
        merge([prefix], f"{prefix}-merged", 70_000)
    path.write_bytes(before[path])
    tool.main(tool.Options([prefix], add_checksums=True))
    assert {path: path.read_bytes() for path in before} == before
