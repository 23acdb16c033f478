"""The training sample: uniform, bounded, a function of the documents; sources and figures."""

import json
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from metro_megatron.text.documents import ReadOptions, SourcedDocument, read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.text.records import Reject
from metro_megatron.tokenizer.report import REPORT_FILE, measure, table, write_report
from metro_megatron.tokenizer.sample import sample_documents


def test_sample_is_uniform_bounded_and_a_function_of_the_seed() -> None:
    documents = [SourcedDocument([f"{number:04d}", "xxxxxx"]) for number in range(4000)]
    sample = sample_documents(iter(documents), 10_000, seed=3)
    assert len(sample) == 1000
    assert sample == sorted(sample, key=lambda one: one.units), "documents keep their order"
    assert sample == sample_documents(iter(documents), 10_000, seed=3)
    assert sample != sample_documents(iter(documents), 10_000, seed=4)
    quarters = [sum(int(one.units[0]) // 1000 == quarter for one in sample) for quarter in range(4)]
    assert all(200 < count < 300 for count in quarters), quarters
    assert sample_documents(iter(documents), 40_000) == documents


def test_long_documents_do_not_starve_the_rest() -> None:
    """Ten books of 50 kB among 1,000 articles of 100 bytes, and room for 20 kB: 200 bytes of a book at most."""
    documents = [SourcedDocument(["b" * 150, "\u00e9" * 25_000] if n % 100 == 7 else ["a" * 100]) for n in range(1000)]
    sizes = [[sum(len(unit.encode()) for unit in one.units) for one in sample_documents(documents, 20_000, seed)]
             for seed in range(5)]  # fmt: skip
    assert all(max(one) <= 200 and 19_500 < sum(one) <= 20_000 and len(one) > 180 for one in sizes)
    whole = sum(len(unit.encode()) for one in documents for unit in one.units)
    assert sample_documents(documents, whole) == documents
    (cut,) = {tuple(one.units) for one in sample_documents(documents, 100_000 - 1, 1) if "b" * 150 in one.units}
    assert cut == ("b" * 150, "\u00e9" * 424)


def test_documents_know_their_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n\\ntwo"}\nbroken\n')
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    rejects: Counter[Reject] = Counter()
    positions: list[int] = []
    files = find_inputs([f"left={tmp_path / 'a.jsonl'}", str(tmp_path / "b.txt")])
    documents = list(read_documents(files, rejects, ReadOptions(), positions.append))
    assert documents == [
        SourcedDocument(["one", "two"], "left"),
        SourcedDocument(["three"]),
        SourcedDocument(["four"]),
    ]
    assert rejects == {Reject.INVALID_JSON: 1}
    assert positions == sorted(positions)


def test_figures(tokenizer_folder: Path, reviews: list[list[str]], tmp_path: Path) -> None:
    documents = [SourcedDocument(one, "films") for one in reviews[:50]]
    documents += [SourcedDocument(["\u2603\u2603 a"], "snow"), SourcedDocument(["good film"], "films")]
    figures = measure(tokenizer_folder, documents)
    assert list(figures) == ["films", "snow", "all"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    units = [unit for one in [*reviews[:50], ["good film"]] for unit in one]
    tokens = sum(map(len, processor.encode(units)))
    films = figures["films"]
    assert (films.documents, films.tokens) == (51, tokens)
    assert films.text_bytes == sum(len(unit.encode()) for unit in units)
    assert films.tokens_per_word == pytest.approx(tokens / sum(len(unit.split()) for unit in units))
    assert films.bytes_per_token == pytest.approx(films.text_bytes / tokens)
    alphabet = {processor.id_to_piece(i) for i in range(261, 2000)} | {" "}
    characters = "".join(units)
    assert films.coverage == pytest.approx(sum(one in alphabet for one in characters) / len(characters))
    ids = processor.encode("\u2603\u2603 a")
    assert figures["snow"].byte_fallback_rate == pytest.approx(6 / len(ids))
    assert figures["snow"].coverage == pytest.approx(2 / 4)
    assert figures["all"].tokens == films.tokens + len(ids)
    assert len(table(figures)) == 4
    write_report(tmp_path, figures, {"vocab_size": 2000})
    report = json.loads((tmp_path / REPORT_FILE).read_text())
    assert report["vocab_size"] == 2000
    assert report["sources"]["films"]["tokens"] == tokens
    assert list(measure(tokenizer_folder, documents[:3])) == ["films"]
