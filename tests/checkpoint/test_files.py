"""Damaged and malicious checkpoint folders are refused before anything of them is used."""

import contextlib
import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from metro_megatron.checkpoint.files import (
    TRACKER,
    check_metadata,
    resumable_steps,
    tracked_step,
    verify_integrity,
    write_integrity,
)
from metro_megatron.checkpoint.sums import KINDS
from metro_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"weight": torch.arange(12.0).view(3, 4), "half": torch.ones(5, dtype=torch.bfloat16)}
    dcp.save(state, checkpoint_id=str(tmp_path / "iter_0000007"), no_dist=True)
    write_integrity(tmp_path / "iter_0000007")
    return tmp_path / "iter_0000007"


def test_a_whole_folder_is_accepted(folder: Path) -> None:
    verify_integrity(folder)
    metadata = check_metadata(folder)
    assert metadata.state_dict_metadata["weight"].size == (3, 4)
    files = json.loads((folder / "integrity.json").read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {"integrity.json"}
    assert files[".metadata"]["bytes"] == (folder / ".metadata").stat().st_size


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    path = folder / name
    contents = bytearray(path.read_bytes())
    contents[random.Random(0).randrange(len(contents))] ^= 1
    path.write_bytes(contents)
    with pytest.raises(UserError, match="damaged") as raised:
        verify_integrity(folder)
    assert str(path) in raised.value.problems[0]


def test_a_load_compares_the_fastest_sum_that_is_there_and_verifying_all(folder: Path) -> None:
    def rewrite(change: Callable[[dict[str, str]], object]) -> None:
        integrity = json.loads((folder / "integrity.json").read_text())
        change(integrity["files"]["__0_0.distcp"])
        (folder / "integrity.json").write_text(json.dumps(integrity))

    rewrite(lambda entry: entry.update(sha256="0" * 64))
    verify_integrity(folder)
    with pytest.raises(UserError, match=r"__0_0.distcp: damaged, its contents are not what was written \(sha256 "):
        verify_integrity(folder, kinds=KINDS)
    rewrite(lambda entry: entry.pop("crc32"))  # as it was written before
    with pytest.raises(UserError, match=r"__0_0.distcp: damaged, its contents"):
        verify_integrity(folder)
    rewrite(lambda entry: entry.update(sha256=hashlib.sha256((folder / "__0_0.distcp").read_bytes()).hexdigest()))
    verify_integrity(folder)
    verify_integrity(folder, kinds=KINDS)


def test_all_damage_is_reported_at_once(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with (folder / "__0_0.distcp").open("ab") as file:
        file.truncate(100)
    with pytest.raises(UserError) as raised:
        verify_integrity(folder)
    text = str(raised.value)
    assert "__0_0.distcp: damaged, has 100 bytes" in text
    assert ".metadata: missing" in text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"../a": {"bytes": 1, "sha256": ""}}}']
)
def test_unusable_integrity_is_a_message(folder: Path, text: str) -> None:
    (folder / "integrity.json").write_text(text)
    with pytest.raises(UserError, match=r"integrity\.json"):
        verify_integrity(folder)


def test_missing_integrity_is_a_message(folder: Path) -> None:
    (folder / "integrity.json").unlink()
    with pytest.raises(UserError, match="not complete, or not one of ours"):
        verify_integrity(folder)


class Malicious:
    def __init__(self, function: object, argument: str):
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, torch.load, pickle.loads])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_in_metadata_is_never_run(folder: Path, tmp_path: Path, function: object, protocol: int) -> None:
    victim = tmp_path / "touched"
    argument = f"touch {victim}" if function is os.system else f"open({str(victim)!r}, 'w')"
    metadata = check_metadata(folder)
    metadata.planner_data = Malicious(function, argument)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(UserError, match="could run code"):
        check_metadata(folder)
    assert not victim.exists()


def test_a_dotted_name_does_not_reach_into_an_allowed_module(folder: Path) -> None:
    # Protocol 4 resolves "a.b" by attribute: torch.serialization imports os.
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c\x04true\x85R.")
    with pytest.raises(UserError, match=r"torch\.serialization\.os\.system"):
        check_metadata(folder)


def test_files_outside_the_folder_are_refused(folder: Path) -> None:
    metadata = check_metadata(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../other"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="outside its folder"):
        check_metadata(folder)


def test_garbage_metadata_is_a_message(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    generator = random.Random(0)
    for contents in (b"", b"\x80", whole[:50], whole[:-1], pickle.dumps({"a": 1}), generator.randbytes(200)):
        (folder / ".metadata").write_bytes(contents)
        with pytest.raises(UserError):
            check_metadata(folder)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (folder / ".metadata").write_bytes(damaged)
        with contextlib.suppress(UserError):
            check_metadata(folder)


def test_a_tracker_names_a_checkpoint_that_is_there_or_none(tmp_path: Path) -> None:
    for name in ("iter_0000007", "iter_10000000", "iter_8", "iter_000000\u0669", "iter_0000005.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000009").write_text("a file")
    for text in (b"", b"\xff\xfe", b"-7", b"7.0", b"8", b"9", "\u0667".encode(), b"7" * 300, b"7" * 5000):
        (tmp_path / TRACKER).write_bytes(text)
        assert tracked_step(tmp_path) is None and resumable_steps(tmp_path) == [10_000_000, 7]
    (tmp_path / TRACKER).write_bytes(b"7\r\n")
    assert tracked_step(tmp_path) == 7 and resumable_steps(tmp_path) == [7]
