"""The two data tools as users run them: equal bytes for any number of workers, exact counts, refusals."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from metro_megatron.data.preprocess import PreprocessOptions, preprocess
from metro_megatron.data.shards import Shard
from metro_megatron.data.sources import Source
from metro_megatron.data.tokenizer import Tokenizer
from metro_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD = b'{"text": "good"}\n'


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def corpus(folder: Path, reviews: list[list[str]]) -> list[str]:
    """Reviews over four files of different kinds, with some bad records and one very long document."""
    lines = [json.dumps({"text": "\n".join(review)}).encode() + b"\n" for review in reviews]
    lines.insert(
        700, json.dumps({"text": "\n".join("\n".join(review) for review in reviews)}).encode() + b"\n"
    )
    lines.insert(3, b'{"text": 3}\n')
    (folder / "a.jsonl").write_bytes(b"".join(lines[:500]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[500:800])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[800:])))
    (folder / "d.txt").write_bytes(b"\n\n".join("\n".join(review).encode() for review in reviews))
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt")]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_output_is_the_documents_for_any_number_of_workers(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path
) -> None:
    files = corpus(tmp_path, reviews)
    for workers in (1, 3):
        result = run_tool(
            "preprocess_data",
            *("--input", *files, "--tokenizer", tokenizer_folder),
            *("--output_prefix", tmp_path / f"out{workers}" / "s", "--workers", workers),
        )
        assert result.returncode == 0, result.stderr
        assert "pretrain_metro.py" in result.stdout and "not_a_string: 1" in result.stdout
    for name in ("s.bin", "s.idx", "s.manifest.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()
    shard = Shard.open(str(tmp_path / "out1" / "s"))
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    everything = [unit for review in reviews for unit in review]
    expected = [*reviews[:700], everything, *reviews[700:], *reviews]
    assert shard.tokens.tolist() == [
        i for units in expected for ids in tokenizer.encode_batch(units) for i in ids
    ]
    assert (shard.document_index[1:] - shard.document_index[:-1]).tolist() == list(map(len, expected))
    manifest = shard.manifest
    assert manifest["rejects"] == {"not_a_string": 1}
    assert manifest["sources"] == [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path in files
        for data in [Path(path).read_bytes()]
    ]
    for ending in ("bin", "idx"):
        data = (tmp_path / "out1" / f"s.{ending}").read_bytes()
        assert manifest["files"][ending] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("e.jsonl", b"", {}, "no documents in .*no records"),
        ("e.jsonl", b'{"Text": "a"}\n' * 3, {}, r"no documents in .*3 missing_key.*e\.jsonl:1 missing_key"),
        ("u.jsonl", '{"text": "a"}'.encode("utf-16"), {}, "no documents in .*not_utf8"),
        ("r.jsonl", GOOD * 998 + b"\n\xff\n{\n", {}, r"2 of 1,000 records \(0.20%\).*r\.jsonl:1000 not_utf8"),
        (
            "r.jsonl",
            GOOD * 10**4 + b"{\n",
            {"strict": True},
            r"r\.jsonl:10001 invalid_json: rejected, and --strict",
        ),
        ("l.txt", b"x" * 50 + b"\n\nx", {"max_document_bytes": 49}, "1 too_long"),
        ("t.jsonl.gz", gzip.compress(GOOD * 100)[:-3], {}, r"t\.jsonl\.gz: \.gz data damaged or cut off"),
        ("t.jsonl", GOOD, {"workers": 0}, "--workers 0"),
        ("t.jsonl", GOOD, {"max_reject_fraction": 2.0}, "--max_reject_fraction 2.0"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, tokenizer_folder: Path, name: str, data: bytes, options: dict, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        preprocess(
            PreprocessOptions([str(tmp_path / name)], str(tokenizer_folder), str(tmp_path / "s"), **options)
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rejects_within_the_limit_are_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 1998 + b"\xff\n" + b'{"text": " "}\n')
    options = PreprocessOptions([str(tmp_path / "a.jsonl")], str(tokenizer_folder), str(tmp_path / "s"))
    summary = preprocess(options)
    assert summary.manifest["rejects"] == {"empty": 1, "not_utf8": 1}
    assert [example.rpartition("/")[2] for example in summary.examples] == [
        "a.jsonl:1999 not_utf8",
        "a.jsonl:2000 empty",
    ]
    assert summary.manifest["documents"] == 1998


def test_an_input_that_grows_while_it_is_read(tmp_path: Path, tokenizer_folder: Path, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def grow_then_open(name: str) -> Source:
        path.write_bytes(GOOD * 2)
        return Source(name)

    monkeypatch.setattr("metro_megatron.data.preprocess.Source", grow_then_open)
    with pytest.raises(UserError, match="changed from 17 to 34 bytes"):
        preprocess(PreprocessOptions([str(path)], str(tokenizer_folder), str(tmp_path / "s")))


def test_tools_print_every_problem_once_and_exit_2(tmp_path: Path, tokenizer_folder: Path) -> None:
    missing = [tmp_path / "missing.jsonl", tmp_path / "gone.txt"]
    options = ("--tokenizer", tokenizer_folder, "--output_prefix", tmp_path / "s")
    result = run_tool("preprocess_data", "--input", *missing, *options)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"error: {path}: no such file" for path in missing]
    (tmp_path / "a.txt").write_bytes(b"some words")
    options = ("--tokenizer", tmp_path / "nothing", "--output_prefix", tmp_path / "s")
    result = run_tool("preprocess_data", "--input", tmp_path / "a.txt", *options)
    assert (result.returncode, result.stderr.count("error: tokenizer folder")) == (2, 1)
    result = run_tool(
        "train_tokenizer", "--input", tmp_path / "a.txt", "--vocab_size", 9000, "--output", tmp_path / "t"
    )
    assert (result.returncode, result.stderr.count("error: vocab_size 9000 is above")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_train_tokenizer(tmp_path: Path, reviews: list[list[str]]) -> None:
    files = corpus(tmp_path, reviews)
    arguments = (
        "--input",
        *files,
        "--vocab_size",
        1000,
        "--output",
        tmp_path / "t",
        "--sample_bytes",
        500_000,
    )
    result = run_tool("train_tokenizer", *arguments)
    assert result.returncode == 0, result.stderr
    assert "tokens per word" in result.stdout and "tools/preprocess_data.py" in result.stdout
    assert "1 not_a_string" in result.stdout
    assert Tokenizer.from_folder(tmp_path / "t").vocab_size == 1000
    before = content(tmp_path / "t")
    assert run_tool("train_tokenizer", *arguments).returncode == 2
    assert run_tool("train_tokenizer", *arguments, "--overwrite").returncode == 0
    assert content(tmp_path / "t") == before


def test_no_torch_where_it_is_not_needed(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some words")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import preprocess_data, train_tokenizer
preprocess_data.main([{str(tmp_path / "a.txt")!r}], {str(tokenizer_folder)!r}, {str(tmp_path / "s")!r})
heavy = {{"torch", "megatron", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_at_work(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path, signal_number: signal.Signals
) -> None:
    """Ctrl-C cleans up, kill -9 leaves no shard; both leave no process, and the same command then works."""
    text = b"".join(json.dumps({"text": "\n".join(review)}).encode() + b"\n" for review in reviews) * 20
    (tmp_path / "a.jsonl").write_bytes(text)
    prefix = tmp_path / "out" / "s"
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_folder, "--output_prefix", prefix]
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", *arguments, "--workers", "2"]
    process = subprocess.Popen(
        list(map(str, command)), env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE
    )
    partial = Path(f"{prefix}.bin.partial")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    with pytest.raises(UserError, match="no such file"):
        Shard.open(str(prefix))
    if signal_number == signal.SIGINT:
        assert list(prefix.parent.iterdir()) == []
        assert errors.decode().splitlines() == ["interrupted"]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    (tmp_path / "a.jsonl").write_bytes(text[: len(text) // 20])
    assert run_tool("preprocess_data", *arguments).returncode == 0
    assert Shard.open(str(prefix)).manifest["documents"] == len(reviews)
    assert not list(prefix.parent.glob("*partial"))
