"""Preprocessing as users run it: equal bytes whatever happens on the way, exact counts, refusals that harm nothing."""

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import sentencepiece
import zstandard
from pyarrow import parquet

from metro_megatron.commands import merge_shards
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.data.records import to_json
from metro_megatron.data.samples import build_sample_index
from metro_megatron.data.shards import open_shards
from metro_megatron.errors import UserError
from metro_megatron.inspection.verification import verify
from metro_megatron.preprocess.encoding import ChunkEncoder, encoder_of_process
from metro_megatron.preprocess.journal import ChunkEntry
from metro_megatron.preprocess.merging import merge
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, Summary, preprocess
from metro_megatron.text.inputs import Chunk
from metro_megatron.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
GOOD = b'{"text": "good"}\n'
SMALL = {"chunk_bytes": 60_000, "shard_bytes": 100_000}


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, env=environment(), check=False)


def lines(reviews: list[list[str]]) -> list[bytes]:
    return [json.dumps({"text": "\n".join(review)}).encode() + b"\n" for review in reviews]


def corpus(folder: Path, reviews: list[list[str]]) -> list[str]:
    """Reviews over four files of different kinds, with a bad record and some documents twice."""
    records = lines(reviews)
    records.insert(3, b'{"text": 3}\n')
    (folder / "a.jsonl").write_bytes(b"".join(records[:500]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(records[500:800])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(records[800:])))
    (folder / "d.txt").write_bytes(b"\n\n".join("\n".join(review).encode() for review in reviews[:400]))
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt")]


def run(files: list[str], tokenizer: Path, prefix: Path, plan: dict[str, Any] | None = None, **options: Any) -> Summary:
    made = PlanOptions(**{**SMALL, **(plan or {})})
    return preprocess(PreprocessOptions(files, str(tokenizer), str(prefix), made, **options))[0]


def content(prefix: Path) -> dict[str, bytes]:
    """All files of a dataset by what follows the prefix; nothing else may lie beside them."""
    paths = [path for path in prefix.parent.rglob("*") if path.is_file()]
    return {str(path).removeprefix(str(prefix)): path.read_bytes() for path in paths}


def test_datasets_are_the_documents_whatever_the_workers(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path
) -> None:
    files = corpus(tmp_path, reviews)
    first = run(files, tokenizer_folder, tmp_path / "one" / "s")
    run(files, tokenizer_folder, tmp_path / "two" / "s", workers=3)
    assert content(tmp_path / "one" / "s") == content(tmp_path / "two" / "s")
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    expected = [*reviews, *reviews[:400]]
    shards = open_shards([str(tmp_path / "one" / "s")])
    tokens = [i for shard in shards for i in shard.tokens.tolist()]
    assert tokens == [i for units in expected for ids in tokenizer.encode_batch(units) for i in ids]
    counts = [count for shard in shards for count in (shard.document_index[1:] - shard.document_index[:-1]).tolist()]
    assert counts == list(map(len, expected))
    assert len(shards) > 3 and all(shard.tokens.nbytes <= SMALL["shard_bytes"] for shard in shards)
    assert (first.manifest.rejects, first.manifest.documents) == ({"not_a_string": 1}, len(expected))
    sizes = {file.name: file.bytes for file in first.manifest.sources[0].files}
    assert sizes == {Path(file).name: os.path.getsize(file) for file in files}
    assert str(tmp_path) not in to_json(first.manifest).decode()
    assert run(files, tokenizer_folder, tmp_path / "one" / "s").was_finished


def test_documents_left_out_on_request(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    files = corpus(tmp_path, reviews)
    unique: dict[str, list[str]] = {"\n".join(review): review for review in reviews}
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    lengths = {text: sum(map(len, tokenizer.encode_batch(units))) for text, units in unique.items()}
    limit = sorted(lengths.values())[100]
    summary = run(files, tokenizer_folder, tmp_path / "o" / "s", {"drop_duplicates": True, "min_tokens": limit})
    kept = [text for text in unique if lengths[text] >= limit]
    shards = open_shards([str(tmp_path / "o" / "s")])
    assert [i for shard in shards for i in shard.tokens.tolist()] == [
        i for text in kept for ids in tokenizer.encode_batch(unique[text]) for i in ids
    ]
    short = sum(lengths["\n".join(review)] < limit for review in [*reviews, *reviews[:400]])
    assert summary.manifest.dropped == {"duplicate": len(reviews) + 400 - short - len(kept), "too_short": short}


def test_evaluation_texts_are_left_out(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    """Counted by evaluation file, in one run and in tasks that are merged."""
    files = corpus(tmp_path, reviews)
    held_out = []
    for name, part in (("first", reviews[10:13]), ("second", reviews[12:14]), ("third", reviews[900:910])):
        held_out.append(str(tmp_path / f"{name}.jsonl"))
        Path(held_out[-1]).write_bytes(b"".join(lines(part)))
    plan = {"decontaminate": tuple(held_out)}
    options = {"max_reject_fraction": 0.1}
    manifest = run(files[:1], tokenizer_folder, tmp_path / "o" / "s", plan, **options).manifest
    assert manifest.dropped == {"contaminated": 4}
    assert manifest.documents == 499 - 4
    hits = {"first.jsonl": 3, "second.jsonl": 2, "third.jsonl": 0}
    assert manifest.sources[0].evaluation_hits == hits
    shares = [{**plan, "shard_index": index, "num_shards": 12} for index in range(12)]
    parts = [run(files[:1], tokenizer_folder, tmp_path / "p" / "s", share, **options).prefix for share in shares]
    assert merge(parts, str(tmp_path / "m" / "s"), SMALL["shard_bytes"]) == manifest


WHOLE = [
    *(" two  spaces ", "\n\nlines\r\n\r\nand\n", "a\rb\tc\x0b\x0cd", "no\u00a0break\u2028line\u2029\u3000\ufeff\u200b"),
    *(
        "    def f():\n\treturn 1\n\n\n",
        "<s> is <mask> text\n</s>\n",
        "\n.\n",
        "e\u0301 \u6f22\u5b57\n\U0001f469\u200d\U0001f469",
    ),
    *("long " * 4000 + "\n", "x" * 30_000, "same text", "same text ", "same text\n", "same text"),
]


@pytest.mark.parametrize("engine", ["gigatoken", pytest.param("sentencepiece", marks=pytest.mark.long)])
def test_whole_documents_keep_their_white_space(tmp_path: Path, tokenizer_folder: Path, engine: str) -> None:
    """Ids are those of SentencePiece for the text as it is, decode to it, and fill samples; in one run and in merged
    ones. Copies that differ in white space are no copies."""
    records = [json.dumps({"text": text}).encode() + b"\n" for text in [*WHOLE, "", " \n\t"]]
    (tmp_path / "a.jsonl").write_bytes(b"".join(records))
    plan = {"unit": "document", "drop_duplicates": True, "chunk_bytes": 1000}
    options: dict[str, Any] = {"engine": engine, "max_reject_fraction": 0.2}
    manifest = run([str(tmp_path / "a.jsonl")], tokenizer_folder, tmp_path / "o" / "s", plan, **options).manifest
    assert (manifest.rejects, manifest.dropped) == ({"empty": 2}, {"duplicate": 1})
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    (shard,) = open_shards([str(tmp_path / "o" / "s")])
    ids = [document.tolist() for document in np.split(shard.tokens, np.cumsum(shard.unit_lengths)[:-1])]
    assert ids == [tokenizer.encode(text) for text in WHOLE[:-1]]
    assert [tokenizer.decode(document) for document in ids] == WHOLE[:-1]
    assert np.array_equal(shard.document_index, np.arange(len(WHOLE)))
    lengths = build_sample_index([shard], 128).length
    full = [[126] * (len(document) // 126) + [len(document) % 126] for document in ids]
    assert lengths.tolist() == [length for document in full for length in document if length]
    shares = [{**plan, "shard_index": index, "num_shards": 2} for index in range(2)]
    options["max_reject_fraction"] = 1.0
    parts = [run([str(tmp_path / "a.jsonl")], tokenizer_folder, tmp_path / "p" / "s", one, **options) for one in shares]
    merge([part.prefix for part in parts], str(tmp_path / "m" / "s"), SMALL["shard_bytes"])
    assert content(tmp_path / "m" / "s") == content(tmp_path / "o" / "s")


@pytest.mark.parametrize("plan", [{}, {"drop_duplicates": True}])
def test_parts_merge_to_the_same_bytes(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path, plan: dict[str, Any]
) -> None:
    files = corpus(tmp_path, reviews)
    run(files, tokenizer_folder, tmp_path / "one" / "s", plan)
    parts = []
    for index in range(15):
        share = {**plan, "shard_index": index, "num_shards": 15}
        parts.append(run(files, tokenizer_folder, tmp_path / "parts" / "s", share, max_reject_fraction=0.1).prefix)
    if plan:
        hashes = Path(f"{parts[7]}.hashes")
        whole = hashes.read_bytes()
        hashes.write_bytes(whole[:-16])
        with pytest.raises(UserError, match=f"{hashes}: .* when written: damaged"):
            merge(parts, str(tmp_path / "merged" / "s"), SMALL["shard_bytes"])
        hashes.write_bytes(whole)
    result = run_tool(
        "merge_shards",
        *("--input", *(f"{part}.manifest.json" for part in parts)),
        *("--output_prefix", tmp_path / "merged" / "s", "--shard_bytes", SMALL["shard_bytes"]),
    )
    assert result.returncode == 0 and "pretrain_metro.py" in result.stdout, result.stderr
    assert content(tmp_path / "one" / "s") == content(tmp_path / "merged" / "s")
    with pytest.raises(UserError, match="finished dataset"):
        merge(parts, str(tmp_path / "merged" / "s"), 10**6)
    (tmp_path / "e.jsonl").write_bytes(b"".join(lines(reviews[::-1])))
    run([str(tmp_path / "e.jsonl")], tokenizer_folder, tmp_path / "two" / "s", plan)
    both = [str(tmp_path / name / "s") for name in ("one", "two")]
    merge(both, str(tmp_path / "both" / "s"), 10**9)
    (merged,) = open_shards([str(tmp_path / "both" / "s")])
    assert merged.tokens.tolist() == [i for shard in open_shards(both) for i in shard.tokens.tolist()]


def test_tasks_that_are_missing_or_out_of_order_are_named(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines(reviews[:40])) * 4)  # so that tasks read the same bytes
    size = (tmp_path / "a.jsonl").stat().st_size // 4
    shares = [{"num_shards": 4, "shard_index": index, "chunk_bytes": size} for index in range(4)]
    files, out = [str(tmp_path / "a.jsonl")], tmp_path / "p" / "s"
    parts = [run(files, tokenizer_folder, out, share).prefix for share in shares]

    def refusal(*numbers: int) -> list[str]:
        with pytest.raises(UserError) as refused:
            merge([parts[number] for number in numbers], str(tmp_path / "m"), 10**6)
        return refused.value.problems

    (problem,) = refusal(0, 3)
    assert problem == (
        f"{out}.part-0001-of-0004, {out}.part-0002-of-0004: missing of the 4 tasks that share the documents out; "
        "finish and give them all"
    )
    assert refusal(0, 2, 1, 3) == [f"tasks 0, 2, 1, 3 of 4 beside {parts[0]}: give each once and in order"]
    assert len(refusal(0, 1, 2, 3, 0)) == 2
    merge_shards.main(merge_shards.Options([f"{out}.part-*.manifest.json"], str(tmp_path / "m")))
    assert read_manifest(str(tmp_path / "m")).documents == 160
    verify(str(tmp_path / "m"))
    verify(parts[1])
    # As an earlier release merged what was given.
    manifest = read_manifest(str(tmp_path / "m"))
    (source,) = manifest.sources
    (file,) = source.files
    kept = (replace(file, pieces=(*file.pieces[:1], *file.pieces[2:])),)
    without = replace(manifest, sources=(replace(source, files=kept),))
    DatasetPaths(str(tmp_path / "m")).manifest.write_bytes(to_json(without))
    with pytest.raises(UserError, match=rf"bytes {size:,} to {2 * size:,} of a\.jsonl were never read: a task"):
        verify(str(tmp_path / "m"))


@pytest.mark.parametrize("is_finished", [True, False])
def test_hashes_decide_whether_inputs_are_the_same(tmp_path: Path, tokenizer_folder: Path, is_finished: bool) -> None:
    """Of a finished run, and of one that was interrupted: times only save work."""
    path, prefix, rest = tmp_path / "a.jsonl", tmp_path / "s", b"" if is_finished else b"{\n"
    good, other = GOOD * 50 + rest, GOOD * 49 + GOOD.replace(b"good", b"bad!") + rest
    attempt = partial(run, [str(path)], tokenizer_folder, prefix)
    stops = partial(pytest.raises, UserError, match="1 of 51 records")
    path.write_bytes(good)
    with contextlib.nullcontext() if is_finished else stops():
        attempt()
    for time_ns in (time.time_ns(), time.time_ns() + 90 * 10**9, 10**18):
        path.write_bytes(good)
        os.utime(path, ns=(time_ns, time_ns))
        if is_finished:
            assert attempt().was_finished
            continue
        chunk = tmp_path / "s.work" / "chunk-000000.json"
        before = chunk.stat().st_mtime_ns
        with stops():
            attempt()
        assert chunk.stat().st_mtime_ns == before, "what was done is kept"
    path.write_bytes(other)
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(UserError, match=r"a\.jsonl: has other bytes than when it was read"):
        attempt()
    attempt(overwrite=True, max_reject_fraction=0.1)
    (shard,) = open_shards([str(prefix)])
    assert Tokenizer.from_folder(tokenizer_folder).decode(shard.tokens[-8:].tolist()).endswith("bad!")


@pytest.mark.parametrize(("name", "last"), [("a.txt", 2), ("b.parquet", 3)])
def test_a_touch_is_no_change(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: int
) -> None:
    """While a file is read; other bytes of the same length are named, whichever of its chunks were read before."""
    path, encode = tmp_path / name, ChunkEncoder.encode

    def write(word: str) -> None:
        if name == "a.txt":
            path.write_text(f"first\n\n{word}\n\n" * 20)
        else:
            table = pyarrow.table({"text": [f"first {word}"] * 20})
            parquet.write_table(table, path, row_group_size=5)

    def attempt(word: str, after: int) -> Summary:
        """With other content, and a time long gone, from behind a chunk on."""

        def encode_then_write(self: ChunkEncoder, chunk: Chunk, *others: Any) -> ChunkEntry:
            entry = encode(self, chunk, *others)
            if chunk.number == after:
                write(word)
                os.utime(path, ns=(1, 1))
            return entry

        monkeypatch.setattr(ChunkEncoder, "encode", encode_then_write)
        return run([str(path)], tokenizer_folder, tmp_path / f"{word}{after}", {"chunk_bytes": 100}, workers=1)

    for word, after in (("good", 0), ("good", last), ("bad!", 0), ("bad!", last - 1), ("bad!", last)):
        write("good")
        if word == "good":
            assert attempt(word, after).manifest.documents == (40 if name == "a.txt" else 20)
            continue
        for _ in range(2):
            with pytest.raises(UserError, match=f"{name}: has other bytes than when it was read"):
                attempt(word, after)


def test_damaged_parts_of_an_interrupted_run_are_written_again(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines(reviews[:80])) * 2 + b"{\n")
    plan = {"drop_duplicates": True, "chunk_bytes": 20_000}
    attempt = partial(run, [str(tmp_path / "a.jsonl")], tokenizer_folder, plan=plan, workers=1)
    attempt(tmp_path / "one" / "s", max_reject_fraction=0.1)
    prefix = tmp_path / "two" / "s"
    with pytest.raises(UserError, match="1 of 161 records"):
        attempt(prefix)
    work = DatasetPaths(str(prefix)).work
    for number, section in enumerate(("tokens", "units", "documents", "hashes")):
        path = work / f"chunk-{number:06d}.{section}"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
    (work / "chunk-000004.tokens").write_bytes((work / "chunk-000004.tokens").read_bytes()[:-2])
    (work / "chunk-000005.units").unlink()
    attempt(prefix, max_reject_fraction=0.1)
    assert capsys.readouterr().err.count("is encoded again") == 6
    assert content(tmp_path / "one" / "s") == content(prefix)


def test_output_below_the_input(
    tmp_path: Path, tokenizer_folder: Path, reviews: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run leaves in its input's folder is no input of the next one, also after an interruption."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines(reviews[:50])) + b"{\n")
    shutil.copytree(tokenizer_folder, tmp_path / "in" / "tokenizer")
    attempt = partial(run, [str(tmp_path / "in")], tmp_path / "in" / "tokenizer", tmp_path / "in" / "s")
    with pytest.raises(UserError, match="1 of 51 records"):
        attempt()
    with pytest.raises(UserError, match="1 of 51 records"):
        attempt()
    assert attempt(max_reject_fraction=0.1).manifest.documents == 50
    assert attempt().was_finished
    assert "left out of folders and globs" in capsys.readouterr().err


def test_a_process_holds_one_tokenizer_whatever_the_sources(tmp_path: Path, tokenizer_folder: Path) -> None:
    inputs = []
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD)
        inputs.append(f"{name}={tmp_path / name}.jsonl")
    made = preprocess(PreprocessOptions(inputs, str(tokenizer_folder), str(tmp_path / "o" / "{source}"), workers=1))
    assert [one.manifest.documents for one in made] == [1, 1, 1]
    assert encoder_of_process.cache_info().currsize == 1  # type: ignore[attr-defined]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    """kill -9 of everything; the same command then gives the same bytes."""
    files = corpus(tmp_path, reviews)
    plan = {"drop_duplicates": True, "chunk_bytes": 20_000, "shard_bytes": 20_000}
    run(files, tokenizer_folder, tmp_path / "one" / "s", plan)
    prefix = tmp_path / "killed" / "s"
    arguments = command(
        *("preprocess_data", "--input", *files, "--tokenizer", tokenizer_folder, "--output_prefix", prefix),
        *("--workers", 2, "--drop_duplicates", "--chunk_bytes", 20_000, "--shard_bytes", 20_000),
    )
    work = DatasetPaths(str(prefix)).work
    generator = random.Random(5)
    made: set[str] = set()
    for moment in ("chunk-000002.json", "chunk-*.json", "shard-00003.json", "shard-*.json"):
        process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
        before = len(list(work.glob(moment)))
        wait_for(lambda: len(list(work.glob(moment))) > before or process.poll() is not None)  # noqa: B023
        time.sleep(generator.random() * 0.02)
        kept = {path.name: path.stat().st_mtime_ns for path in work.glob("chunk-*.json")}
        with contextlib.suppress(ProcessLookupError):  # the last of them may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not DatasetPaths(str(prefix)).manifest.exists() or not work.exists() or process.returncode < 0
        made |= kept.keys()
    result = subprocess.run(arguments, env=environment(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(made) > 5
    assert content(tmp_path / "one" / "s") == content(prefix)


def test_a_worker_that_is_killed(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    """As the kernel does when memory runs out: refused with the reason, and nothing finished is lost."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines(reviews)) * 10)
    prefix = tmp_path / "killed" / "s"
    arguments = ("--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_folder, "--output_prefix", prefix)
    whole = command("preprocess_data", *arguments, "--workers", 2, "--chunk_bytes", 300_000)
    process = subprocess.Popen(whole, env=environment(), stderr=subprocess.PIPE)
    wait_for(lambda: list(prefix.parent.glob("s.work/chunk-*.json")) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and b"a worker process ended unexpectedly" in errors, errors
    result = subprocess.run(whole, env=environment(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    plan = {"chunk_bytes": 300_000, "shard_bytes": PlanOptions().shard_bytes}
    run([str(tmp_path / "a.jsonl")], tokenizer_folder, tmp_path / "one" / "s", plan)
    assert content(tmp_path / "one" / "s") == content(prefix)


def test_control_strings_and_parquet(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Text that spells special tokens stays text, whichever kind of file and engine it comes through."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["plain words", "a <s> b</s>", "<mask><pad>\n<unk> x", "\u2581 caf\u00e9 \U0001f642\ttab"] * 50
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=30)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\r\n" for text in texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    expected = [i for text in texts for unit in text.split("\n") for i in processor.encode(unit)]
    for engine in ("gigatoken", "sentencepiece"):
        for name in ("a.parquet", "b.jsonl"):
            prefix = tmp_path / f"{engine}-{name}" / "s"
            run([str(tmp_path / name)], tokenizer_folder, prefix, {"chunk_bytes": 500}, engine=engine)
            assert [i for shard in open_shards([str(prefix)]) for i in shard.tokens.tolist()] == expected


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_parent_that_ends_takes_its_workers_along(
    tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path, signal_number: signal.Signals
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines(reviews)) * 10)
    prefix = tmp_path / "out" / "s"
    arguments = ("--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_folder, "--output_prefix", prefix)
    process = subprocess.Popen(
        command("preprocess_data", *arguments, "--workers", 2, "--chunk_bytes", 300_000),
        env=environment(),
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: list(prefix.parent.glob("s.work/chunk-*.json")) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    assert signal_number == signal.SIGKILL or errors.decode().splitlines()[-1] == "interrupted"
    with pytest.raises(UserError, match="was not finished"):
        open_shards([str(prefix)])
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert children and not [child for child in children if Path(f"/proc/{child}").exists()]


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("e.jsonl", b"", {}, "no documents in .*no records"),
        ("e.jsonl", b'{"Text": "a"}\n' * 3, {}, r"no documents in .*3 missing_key.*e\.jsonl at 0: missing_key"),
        ("r.jsonl", GOOD * 998 + b"\n\xff\n{\n", {}, r"2 of 1,000 records \(0.20%\).*not_utf8"),
        ("r.jsonl", GOOD * 9999 + b"{\n", {"strict": True}, r"r\.jsonl at 169,983: invalid_json \('\{'\): .*--strict"),
        ("l.txt", b"x" * 50 + b"\n\nx", {"plan": {"max_document_bytes": 49}}, "1 too_long"),
        ("t.jsonl.gz", gzip.compress(GOOD * 100, mtime=0)[:-3], {}, r"t\.jsonl\.gz: \.gz data damaged or cut off"),
        ("e.jsonl", b"{\n", {"plan": {"num_shards": 2, "shard_index": 1}}, r"1 of 1 records \(100.00%\)"),
        ("t.jsonl", GOOD, {"workers": -1}, "--workers is -1"),
        ("t.jsonl", GOOD, {"max_reject_fraction": 2.0}, "--max_reject_fraction is 2.0"),
        ("t.jsonl", GOOD, {"plan": {"num_shards": 2, "shard_index": 2}}, "--shard_index 2"),
    ],
)
def test_refusals_finish_nothing(
    tmp_path: Path, tokenizer_folder: Path, name: str, data: bytes, options: dict, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        run([str(tmp_path / name)], tokenizer_folder, tmp_path / "s", **options)
    assert all(path.name == name or path.name.endswith(".work") for path in tmp_path.iterdir())


def test_what_changed_is_refused_by_name(tmp_path: Path, tokenizer_folder: Path) -> None:
    path, prefix = tmp_path / "a.jsonl", tmp_path / "s"
    path.write_bytes(GOOD * 50 + b"{\n")
    with pytest.raises(UserError, match="rejected"):
        run([str(path)], tokenizer_folder, prefix)
    with pytest.raises(UserError, match="--min_tokens: was 1, is 2"):
        run([str(path)], tokenizer_folder, prefix, {"min_tokens": 2})
    path.write_bytes(GOOD * 60)
    with pytest.raises(UserError, match=r"file a\.jsonl bytes: was 852, is 1020"):
        run([str(path)], tokenizer_folder, prefix)
    assert run([str(path)], tokenizer_folder, prefix, overwrite=True).manifest.documents == 60
    before = content(prefix)
    with pytest.raises(UserError, match="--unit: was line, is sentence"):
        run([str(path)], tokenizer_folder, prefix, {"unit": "sentence"})
    path.write_bytes(GOOD * 59 + GOOD.replace(b"good", b"bad!"))
    with pytest.raises(UserError, match=r"a\.jsonl: has other bytes than when it was read"):
        run([str(path)], tokenizer_folder, prefix)
    assert {name: data for name, data in content(prefix).items() if "a.jsonl" not in name} == {
        name: data for name, data in before.items() if "a.jsonl" not in name
    }
    assert run([str(path)], tokenizer_folder, prefix, overwrite=True).manifest.documents == 60
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        *("a.jsonl", "s.manifest.json", "s.tokenizer", "s_00000.bin", "s_00000.crc", "s_00000.idx")
    ]


def test_outputs_that_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 10)
    (tmp_path / "foreign_00000.bin").write_bytes(b"precious")
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "thesis.tex").write_bytes(b"precious")
    (tmp_path / "file").touch()
    refused = [
        ("foreign", r"foreign_00000\.bin is there already"),
        ("other", "not made by this tool"),
        ("", "names a folder"),
        ("new/..", "names a folder"),
        ("file/s", "cannot write"),
    ]
    before = content(tmp_path)
    for prefix, message in refused:
        with pytest.raises(UserError, match=message):
            preprocess(PreprocessOptions([str(path)], str(tokenizer_folder), f"{tmp_path}/{prefix}"))
    with pytest.raises(UserError, match="cannot write /proc/none/s"):
        preprocess(PreprocessOptions([str(path)], str(tokenizer_folder), "/proc/none/s"))
    for patterns in ([f"..={path}"], [str(path)]):
        with pytest.raises(UserError, match="source name"):
            run(patterns, tokenizer_folder, tmp_path / "{source}" / "s")
    assert content(tmp_path) == before


def test_sources_have_their_own_datasets(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name, count in (("a", 10), ("b", 20)):
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD * count)
    inputs = [f"wiki={tmp_path / 'a.jsonl'}", f"cc={tmp_path / 'b.jsonl'}"]
    with pytest.raises(UserError, match=r"2 sources \(wiki, cc\)"):
        preprocess(PreprocessOptions(inputs, str(tokenizer_folder), str(tmp_path / "s")))
    made = preprocess(PreprocessOptions(inputs, str(tokenizer_folder), str(tmp_path / "out" / "{source}")))
    assert [(Path(one.prefix).name, one.manifest.documents) for one in made] == [("wiki", 10), ("cc", 20)]
    assert [one.manifest.sources[0].name for one in made] == ["wiki", "cc"]


LIMITED = """
import resource, sys
name, limit, *arguments = sys.argv[1:]
resource.setrlimit(getattr(resource, name), (int(limit), int(limit)))
from metro_megatron.commands.preprocess_data import run
sys.argv[1:] = arguments
run()
"""


def test_no_room_on_the_disk(tmp_path: Path, reviews: list[list[str]], tokenizer_folder: Path) -> None:
    """The kernel refuses to let a file grow: as a full disk, without one. With room the same command goes on."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines(reviews)))
    prefix = tmp_path / "o" / "s"
    options = ["--input", path, "--tokenizer", tokenizer_folder, "--output_prefix", prefix, "--chunk_bytes", 100_000]
    limited = [sys.executable, "-c", LIMITED, "RLIMIT_FSIZE", 300_000, *options, "--workers", 1]
    result = subprocess.run(
        list(map(str, limited)), capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert result.returncode == 2 and "MB free" in result.stderr and "finished chunks are kept" in result.stderr
    assert [one.name for one in prefix.parent.iterdir()] == ["s.work"]
    assert not list(prefix.parent.glob("s.work/*.partial")) and list(prefix.parent.glob("s.work/chunk-*.json"))
    assert run_tool("preprocess_data", *options).returncode == 0
    assert open_shards([str(prefix)])[0].manifest.documents == len(reviews)


def test_memory_is_bounded_by_the_longest_document_allowed(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A line of 200 MB is counted, not held."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD * 1000 + b'{"text": "')
        for _ in range(200):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + GOOD * 1000)
    code = (
        "from metro_megatron.commands.preprocess_data import PreprocessOptions, main;"
        f"main(PreprocessOptions([{str(path)!r}], {str(tokenizer_folder)!r}, {str(tmp_path / 'o' / 's')!r}));"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    manifest = open_shards([str(tmp_path / "o" / "s")])[0].manifest
    assert (manifest.documents, manifest.rejects) == (2000, {"too_long": 1})
    assert int(result.stdout.split()[-1]) * 1024 < 300e6, "the line alone has 200 MB"


def test_the_tool_tells_every_problem_once_and_exits_2(tmp_path: Path, tokenizer_folder: Path) -> None:
    missing = [tmp_path / "missing.jsonl", tmp_path / "gone.txt"]
    options = ("--tokenizer", tokenizer_folder, "--output_prefix", tmp_path / "s")
    result = run_tool("preprocess_data", "--input", *missing, *options)
    assert result.returncode == 2
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == list(map(str, missing))
    (tmp_path / "a.txt").write_bytes(b"some words")
    result = run_tool(
        "preprocess_data",
        *("--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "nothing", "--output_prefix", tmp_path / "s"),
    )
    assert (result.returncode, result.stderr.count("error: tokenizer folder")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
