"""Readers on good and hostile input: exact documents, exact counts, bounded memory, named files."""

import gzip
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_megatron.data.documents import (
    Reject,
    Source,
    check_inputs,
    parse_record,
    read_documents,
    read_records,
)
from metro_megatron.errors import UserError


def read(path: Path, **options) -> tuple[list[list[str]], dict[str, int]]:
    rejects: Counter[Reject] = Counter()
    documents = list(read_documents([str(path)], rejects, **options))
    return documents, {str(reason): count for reason, count in rejects.items()}


def json_lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


CASES = [
    (b'{"text": "a\\nb"}', ["a", "b"]),
    (b'{"id": 1, "text": " a \\r\\n\\n\\t\\n b"}', ["a", "b"]),
    (b'{"text": "nul \\u0000 stays"}', ["nul \x00 stays"]),
    (b'{"text": "<s> and </s>"}', ["<s> and </s>"]),
    (b'{"text": "twice", "text": "last"}', ["last"]),
    (b'{"text": "pair \\ud83d\\ude42"}', ["pair \U0001f642"]),
    (b'{"text": "open', "invalid_json"),
    (b"{'text': 'a'}", "invalid_json"),
    (b'{"text": "lone \\ud800 surrogate"}', "invalid_json"),
    (b'{"text": "raw nul \x00"}', "invalid_json"),
    (b'{"text": NaN}', "invalid_json"),
    (b'{"text": "a"} {"text": "b"}', "invalid_json"),
    (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "invalid_json"),
    (b'{"text": "\xff\xfe"}', "not_utf8"),
    (b'{"text": "\xed\xa0\x80"}', "not_utf8"),
    (b'["text"]', "not_an_object"),
    (b'"text"', "not_an_object"),
    (b"null", "not_an_object"),
    (b'{"Text": "a"}', "missing_key"),
    (b"{}", "missing_key"),
    (b'{"text": null}', "not_a_string"),
    (b'{"text": ["a"]}', "not_a_string"),
    (b'{"text": 1e400}', "invalid_json"),
    (b'{"text": 1e300}', "not_a_string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\u00a0\\n\\t"}', "empty"),
    (None, "too_long"),
]


@pytest.mark.parametrize(("raw", "expected"), CASES, ids=lambda value: repr(value)[:30])
def test_records_of_json_lines(raw: bytes | None, expected: list[str] | str) -> None:
    assert parse_record(raw, True, "text") == expected


@settings(max_examples=500, deadline=None)
@given(raw=st.binary(max_size=60), is_json=st.booleans())
def test_no_bytes_can_crash_the_parser(raw: bytes, is_json: bool) -> None:
    document = parse_record(raw, is_json, "text")
    assert isinstance(document, Reject) or (
        document and all(line and line == line.strip() for line in document)
    )


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_whole_files(tmp_path: Path, newline: bytes, bom: bytes, last: bool) -> None:
    records = [raw for raw, _ in CASES if raw is not None]
    content = bom + newline.join(records[:3] + [b"", b"  "] + records[3:]) + newline * last
    (tmp_path / "f.jsonl").write_bytes(content)
    documents, rejects = read(tmp_path / "f.jsonl")
    assert documents == [expected for _, expected in CASES if isinstance(expected, list)]
    assert rejects == Counter(expected for raw, expected in CASES if isinstance(expected, str) and raw)


def test_plain_text(tmp_path: Path) -> None:
    content = b"\n\n one \ntwo\n\n \t\r\nthree\r\n\r\n\xff\nx\n\nlast"
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbf" + content)
    assert read(tmp_path / "f.txt") == ([["one", "two"], ["three"], ["last"]], {"not_utf8": 1})
    records = list(read_records(Source(str(tmp_path / "f.txt")), 1000))
    assert [record.line for record in records] == [3, 7, 9, 12]


@pytest.mark.parametrize(
    "name", ["f.jsonl.gz", "f.jsonl.zst", "F.JSONL.GZ", "f.json", "f.ndjson", "a.b.txt.zst"]
)
def test_kinds_and_compressions(tmp_path: Path, name: str) -> None:
    content = b"a\n\nb\n" if "txt" in name else json_lines("a", "b")
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.lower().rsplit(".", 1)[1], bytes)
    path = tmp_path / name
    path.write_bytes(b"".join(compress(half) for half in halves))
    check_inputs([str(path)])
    assert read(path) == ([["a"], ["b"]], {})
    source = Source(str(path))
    assert len(list(read_records(source, 100))) == 2
    assert source.finish()[0] == path.stat().st_size


@pytest.mark.parametrize("limit", [1, 7, 20, 21])
def test_the_limit_is_exact(tmp_path: Path, limit: int) -> None:
    for bom in (b"", b"\xef\xbb\xbf"):
        for newline in (b"\n", b"\r\n"):
            lines = [
                b"x" * size for size in (limit, limit + 1, limit + 2, limit + 3, limit, 3_000_000, limit)
            ]
            (tmp_path / "f.txt").write_bytes(bom + (newline * 2).join(lines))
            documents, rejects = read(tmp_path / "f.txt", max_document_bytes=limit)
            assert documents == [["x" * limit]] * 3
            assert rejects == {"too_long": 4}
    (tmp_path / "f.txt").write_bytes(b"x\n" * 30 + b"\nab")
    documents, rejects = read(tmp_path / "f.txt", max_document_bytes=20)
    assert (documents, rejects) == ([["ab"]], {"too_long": 1})


@pytest.mark.parametrize("ending", ["jsonl", "txt", "jsonl.gz", "jsonl.zst"])
def test_memory_is_bounded_by_the_limit_not_by_a_line(tmp_path: Path, ending: str) -> None:
    content = b'{"text": "' + b"x" * 100_000_000 + b'"}\n' + json_lines("short")
    compress = {"gz": lambda data: gzip.compress(data, 1), "zst": zstandard.compress}.get(ending[6:], bytes)
    (tmp_path / f"f.{ending}").write_bytes(compress(content if "json" in ending else content + b"\nshort"))
    del content
    tracemalloc.start()
    documents, rejects = read(tmp_path / f"f.{ending}", max_document_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (documents, rejects) == ([["short"]], {"too_long": 1})
    assert peak < 16e6


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_cut_off_or_damaged_compressed_files_are_named(tmp_path: Path, compress) -> None:
    whole = compress(json_lines(*(os.urandom(30).hex() for _ in range(200))))
    path = tmp_path / f"bad.jsonl.{'gz' if whole[:2] == gzip.compress(b'')[:2] else 'zst'}"
    for size in (1, 3, 9, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{path}: .* damaged or cut off"):
            read(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (bytes(damaged), b'{"text": "not compressed"}', whole + b"garbage"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or cut off"):
            documents, rejects = read(path)
            assert not rejects and len(documents) == 200, "zstd without checksum cannot see every flip"
            raise UserError("damaged or cut off")


def test_all_unusable_inputs_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(b"")
    names = ["missing.jsonl", "a.parquet", "", "good.jsonl"]
    with pytest.raises(UserError) as refused:
        check_inputs([str(tmp_path / name) for name in names])
    problems = refused.value.problems
    assert [str(tmp_path / name) in problem for name, problem in zip(names, problems, strict=False)] == [
        True
    ] * 3
    assert "no such file" in problems[0] and ".jsonl" in problems[1] and "folder" in problems[2]
    with pytest.raises(UserError, match="no input"):
        check_inputs([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch(mode=0)
    with pytest.raises(UserError, match="cannot be read"):
        check_inputs([str(tmp_path / "a.jsonl")])
