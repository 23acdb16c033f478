"""Folders of tasks that are not what they should be."""

import hashlib
import json
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.probing.folder import FORMAT, encode_rows, read_tasks
from metro_megatron.probing.kinds import KINDS

ROWS = [{"id": f"r{number}", "text": f"text {number}", "label": "ab"[number % 2]} for number in range(6)]


def write(folder: Path, kind: str = "classification", **files: bytes) -> Path:
    contents = {"train": encode_rows(ROWS), "test": encode_rows(ROWS[:2])} | files
    (folder / "t").mkdir(parents=True)
    for side, content in contents.items():
        (folder / "t" / f"{side}.jsonl").write_bytes(content)
    sha256 = {side: hashlib.sha256(content).hexdigest() for side, content in contents.items()}
    facts = {"kind": kind, "baselines": {"tfidf": 0.5}, "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps({"format_version": FORMAT, "tasks": {"t": facts}}))
    return folder


def test_a_whole_folder_and_its_first_texts(tmp_path: Path) -> None:
    (task,) = read_tasks(write(tmp_path / "x"))
    assert (task.name, task.kind, task.train, task.test) == ("t", KINDS["classification"], ROWS, ROWS[:2])
    first = task.first(4)
    assert (first.train, first.test) == (ROWS[:4], ROWS[:2]) and len(task.first(0).train) == 1


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("classification", {"test": b""}, "holds no rows"),
        ("classification", {"test": b'{"id": "1", "text": "", "label": "a"}\n'}, "line 1: text is '', must be a str"),
        ("pairs", {}, "text_a is None"),
        ("colour", {}, "kind is 'colour', must be one of classification, "),
        ("classification", {"train": b'{"text": \n'}, "line 1: not one JSON object"),
        ("classification", {"train": b"[1]\n"}, "line 1: not one JSON object"),
        ("classification", {"train": b'{"text": "x", "label": "a"}\n'}, "line 1: has no id"),
        ("classification", {"train": b"\xff\n"}, "not UTF-8"),
    ],
)
def test_hostile_rows(tmp_path: Path, kind: str, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tasks(write(tmp_path / "x", kind, **files))


def test_hostile_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    with pytest.raises(UserError, match="has no task 'u', but t"):
        read_tasks(folder, ["u"])
    with pytest.raises(UserError, match="no such file; write the folder with tools/make_tasks.py"):
        read_tasks(tmp_path)
    (folder / "t" / "test.jsonl").write_bytes(encode_rows(ROWS))
    with pytest.raises(UserError, match=r"test.jsonl: is not the file that manifest.json describes"):
        read_tasks(folder)
    (folder / "t" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test.jsonl: no such file"):
        read_tasks(folder)
    for content, message in (
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"format_version": 1, "tasks": []}', "not a manifest"),
        ('{"format_version": 9, "tasks": {}}', "has format 9, this program reads 1"),
        ('{"format_version": 1, "tasks": {}}', "lists no task"),
        ('{"format_version": 1, "tasks": {"t": {"kind": "pairs"}}}', "task 't' has no 'sha256'"),
        ('{"format_version": 1, "tasks": {"t": 3}}', "not a manifest"),
    ):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_tasks(folder)
