"""Readers on good and hostile input: exact documents, exact counts, bounded memory, named files."""

import bz2
import gzip
import hashlib
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_megatron.errors import UserError
from metro_megatron.text.documents import ChunkReader, ReadOptions, parse_record, read_documents
from metro_megatron.text.inputs import find_inputs, plan_chunks
from metro_megatron.text.parquet import read_rows
from metro_megatron.text.records import Record, Reject

TEXT = ReadOptions()
COMPRESS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress, "bz2": bz2.compress}


def read(path: Path, **options) -> tuple[list[list[str]], dict[str, int]]:
    rejects: Counter[Reject] = Counter()
    documents = [one.units for one in read_documents(find_inputs([str(path)]), rejects, ReadOptions(**options))]
    return documents, {str(reason): count for reason, count in rejects.items()}


def json_lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


CASES = [
    (b'{"text": "a\\nb"}', ["a", "b"]),
    (b'{"id": 1, "text": " a \\r\\n\\n\\t\\n b"}', ["a", "b"]),
    (b'{"text": "nul \\u0000"}', "nul"),
    (b'{"text": "<s> and </s>"}', ["<s> and </s>"]),
    (b'{"text": "twice", "text": "last"}', ["last"]),
    (b'{"text": "pair \\ud83d\\ude42"}', ["pair \U0001f642"]),
    (b'{"text": "open', "invalid_json"),
    (b"{'text': 'a'}", "invalid_json"),
    (b'{"text": "lone \\ud800 surrogate"}', "invalid_json"),
    (b'{"text": "raw nul \x00"}', "invalid_json"),
    (b'{"text": NaN}', "invalid_json"),
    (b'{"text": "a"} "b"', "invalid_json"),
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
    (Reject.TOO_LONG, "too_long"),
]


@pytest.mark.parametrize(("raw", "expected"), CASES, ids=lambda value: repr(value)[:30])
def test_records_of_json_lines(raw: bytes | Reject, expected: list[str] | str) -> None:
    assert parse_record(Record(0, raw, True), TEXT) == expected


@settings(max_examples=500, deadline=None)
@given(raw=st.binary(max_size=60), is_json=st.booleans())
def test_no_bytes_can_crash_the_parser(raw: bytes, is_json: bool) -> None:
    document = parse_record(Record(0, raw, is_json), TEXT)
    assert isinstance(document, Reject) or (document and all(line and line == line.strip() for line in document))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_whole_files(tmp_path: Path, newline: bytes, bom: bytes, last: bool) -> None:
    records = [raw for raw, _ in CASES if isinstance(raw, bytes)]
    content = bom + newline.join(records[:3] + [b"", b"  "] + records[3:]) + newline * last
    (tmp_path / "f.jsonl").write_bytes(content)
    documents, rejects = read(tmp_path / "f.jsonl")
    assert documents == [expected for _, expected in CASES if isinstance(expected, list)]
    assert rejects == Counter(
        expected for raw, expected in CASES if isinstance(expected, str) and isinstance(raw, bytes)
    )


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\r\r\n"])
def test_line_ends_of_all_systems(tmp_path: Path, end: bytes) -> None:
    """Old Macs' are a return alone; bad conversions leave two before a line end."""
    (tmp_path / "f.txt").write_bytes(end.join([b"", b"one", b"two", b" ", b"three", b"", b"", b"four"]))
    (tmp_path / "f.jsonl").write_bytes(end.join([b'{"text": "one\\r\\rtwo"}', b"", b'{"text": "three"}', b""]))
    assert read(tmp_path / "f.txt") == ([["one", "two"], ["three"], ["four"]], {})
    assert read(tmp_path / "f.jsonl", unit="document") == ([["one\r\rtwo"], ["three"]], {})


def test_plain_text(tmp_path: Path) -> None:
    content = b"\n\n one \ntwo\n\n \t\r\nthree\r\n\r\n\xff\nx\n\nlast"
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbf" + content)
    assert read(tmp_path / "f.txt") == ([["one", "two"], ["three"], ["last"]], {"not_utf8": 1})
    (chunk,) = plan_chunks(find_inputs([str(tmp_path / "f.txt")]), 1000)
    offsets = [record.position for record in ChunkReader(chunk, TEXT)]
    assert [(b"\xef\xbb\xbf" + content)[offset:][:2] for offset in offsets] == [b" o", b"th", b"\xff\n", b"la"]


def in_chunks(path: Path, chunk_bytes: int, options: ReadOptions = TEXT) -> tuple[list[Record], list[str]]:
    """All records, and the hashes of the pieces."""
    readers = [ChunkReader(chunk, options) for chunk in plan_chunks(find_inputs([str(path)]), chunk_bytes)]
    return [record for reader in readers for record in reader], [reader.sha256 for reader in readers]


PIECES = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b" ",
        b"\t\n",
        b"a",
        b"{}",
        b"long long",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\r\r",
        b"\xff",
        b"\xe3\x80\x80",
        b"\xc2\xa0",
    ]
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=40), chunk_bytes=st.integers(4, 30), ending=st.sampled_from(["jsonl", "txt"]))
def test_records_do_not_depend_on_how_a_file_is_cut(tmp_path_factory, pieces, chunk_bytes: int, ending: str) -> None:
    path = tmp_path_factory.mktemp("cut") / f"f.{ending}"
    content = b"".join(pieces)
    path.write_bytes(content)
    options = ReadOptions(max_document_bytes=12)
    records, hashes = in_chunks(path, chunk_bytes, options)
    assert records == in_chunks(path, 1 << 20, options)[0]
    parts = [content[at : at + chunk_bytes] for at in range(0, max(1, len(content)), chunk_bytes)]
    assert hashes == [hashlib.sha256(part).hexdigest() for part in parts]


def test_a_file_that_grows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(json_lines("a", "b"))
    (chunk,) = plan_chunks(find_inputs([str(path)]), 1000)
    with path.open("ab") as file:
        file.write(json_lines("c"))
    with pytest.raises(UserError, match=rf"{path}: changed since the run was planned \(\d+ bytes then, \d+ now"):
        list(ChunkReader(chunk, TEXT))
    (chunk,) = plan_chunks(find_inputs([str(path)]), 1000)
    reader = iter(ChunkReader(chunk, TEXT))
    next(reader)
    os.utime(path, ns=(1, 1))
    assert len(list(reader)) == 2, "a touch is no change"


def test_several_keys_and_sentences(tmp_path: Path) -> None:
    options = ReadOptions(text_keys=("title", "text"), unit="sentence")
    text = 'Mr. Smith met J. R. Ewing, i.e. him. "Why?" He left! at 5 p.m. or so… Then 3.5 miles.'
    raw = json.dumps({"text": f"{text}\nEnd.", "title": "A. Title"}).encode()
    expected = [
        "A. Title",
        "Mr. Smith met J. R. Ewing, i.e. him.",
        '"Why?"',
        "He left! at 5 p.m. or so…",
        "Then 3.5 miles.",
        "End.",
    ]
    assert parse_record(Record(0, raw, True), options) == expected
    assert parse_record(Record(0, b'{"text": "a"}', True), options) == Reject.MISSING_KEY
    assert parse_record(Record(0, b'{"text": "a", "title": 1}', True), options) == Reject.NOT_A_STRING


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from(" \t\n\r\f\v\x85\u00a0\u2028\u2029\u3000\ufeffab.\U0001f642")), is_json=st.booleans()
)
def test_whole_documents_keep_every_character(text: str, is_json: bool) -> None:
    options = ReadOptions(text_keys=("text",), unit="document")
    raw = json.dumps({"text": text}).encode() if is_json else text.encode()
    assert parse_record(Record(0, raw, is_json), options) == ([text] if text.strip() else Reject.EMPTY)
    assert parse_record(Record(0, b"a\0", False), options) == Reject.NUL


def test_whole_documents_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_bytes(b"\n \n  one \r\n\ttwo\rthree \n \t\n\xe2\x80\xa8\n\nlast\n")
    assert read(tmp_path / "f.txt", unit="document") == ([["  one \n\ttwo\nthree "], ["last"]], {})


def test_parquet_is_read_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at once where rows are long, also where few strings in the file stand for many rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{number % 3}" * 100_000 for number in range(300)]
    different = [f"{number}" * 40_000 for number in range(300)]
    table = pyarrow.table({"text": texts, "more": different})
    pages = {"write_batch_size": 4, "use_dictionary": ["text"]}
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=200, **pages)
    monkeypatch.setattr("metro_megatron.text.parquet._BYTES", 1_000_000)
    sizes, before = [0], pyarrow.total_allocated_bytes()

    def rows(columns: list[str]) -> Iterator[tuple[int, list[str]]]:
        for row, values in read_rows(str(tmp_path / "f.parquet"), range(2), columns):
            sizes.append(pyarrow.total_allocated_bytes())
            yield row, values

    expected = [(number, [different[number], texts[number]]) for number in range(300)]
    assert list(rows(["more", "text"])) == expected
    assert [values for _, values in rows(["text"])] == [[one] for one in texts]
    assert max(sizes) < before + 10_000_000, "all rows of a group are 42 MB"


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number}" for number in range(100)] + [None, "x" * 200, "", "a\nb"]
    table = pyarrow.table({"id": list(range(104)), "text": texts})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=10)
    expected = [[text] for text in texts[:100]] + [["a", "b"]], {"not_a_string": 1, "too_long": 1, "empty": 1}
    assert read(tmp_path / "f.parquet", max_document_bytes=100) == expected
    records, hashes = in_chunks(tmp_path / "f.parquet", 1)
    assert [record.position for record in records] == list(range(104))
    assert len(hashes) == 11 and hashes[0] == hashlib.sha256((tmp_path / "f.parquet").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="no column title, only id, text"):
        read(tmp_path / "f.parquet", text_keys=("title",))
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    "name", ["f.jsonl.gz", "f.jsonl.zst", "F.JSONL.GZ", "f.json", "f.ndjson", "a.b.txt.zst", "f.jsonl.bz2"]
)
def test_kinds_and_compressions(tmp_path: Path, name: str) -> None:
    content = b"a\n\nb\n" if "txt" in name else json_lines("a", "b")
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    compress = COMPRESS.get(name.lower().rsplit(".", 1)[1], bytes)
    path = tmp_path / name
    path.write_bytes(b"".join(compress(half) for half in halves))
    assert read(path) == ([["a"], ["b"]], {})
    assert in_chunks(path, 1 << 20)[1] == [hashlib.sha256(path.read_bytes()).hexdigest()]


@pytest.mark.parametrize("limit", [1, 7, 20, 21])
def test_the_limit_is_exact(tmp_path: Path, limit: int) -> None:
    for bom in (b"", b"\xef\xbb\xbf"):
        for newline in (b"\n", b"\r\n"):
            lines = [b"x" * size for size in (limit, limit + 1, limit + 2, limit + 3, limit, 3_000_000, limit)]
            (tmp_path / "f.txt").write_bytes(bom + (newline * 2).join(lines))
            documents, rejects = read(tmp_path / "f.txt", max_document_bytes=limit)
            assert documents == [["x" * limit]] * 3
            assert rejects == {"too_long": 4}
    (tmp_path / "f.txt").write_bytes(b"x\n" * 30 + b"\nab")
    documents, rejects = read(tmp_path / "f.txt", max_document_bytes=20)
    assert (documents, rejects) == ([["ab"]], {"too_long": 1})


@pytest.mark.parametrize("ending", ["jsonl", "txt", "jsonl.gz", "jsonl.zst", "jsonl.bz2"])
def test_memory_is_bounded_by_the_limit_not_by_a_line(tmp_path: Path, ending: str) -> None:
    content = b'{"text": "' + b"x" * 100_000_000 + b'"}\n' + json_lines("short")
    compress = {**COMPRESS, "gz": lambda data: gzip.compress(data, 1)}.get(ending[6:], bytes)
    (tmp_path / f"f.{ending}").write_bytes(compress(content if "json" in ending else content + b"\nshort"))
    del content
    tracemalloc.start()
    documents, rejects = read(tmp_path / f"f.{ending}", max_document_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (documents, rejects) == ([["short"]], {"too_long": 1})
    assert peak < 16e6


@pytest.mark.parametrize("compression", COMPRESS)
def test_cut_off_or_damaged_compressed_files_are_named(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](json_lines(*(os.urandom(30).hex() for _ in range(200))))
    path = tmp_path / f"bad.jsonl.{compression}"
    for size in (1, 3, 9, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{path}: .* damaged or cut off"):
            read(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    bad = [bytes(damaged), b'{"text": "not compressed\0"}']
    if compression != "bz2":  # bz2 ignores what follows the last stream
        bad.append(whole + b"garbage")
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or cut off"):
            read(path)


def test_a_mark_of_byte_order_is_text_but_at_the_begin_of_a_file(tmp_path: Path) -> None:
    for content in (b"\n\xef\xbb\xbf\na", b"\xef\xbb\xbf\na", b"\xef\xbb\xbf \na", b"\xef\xbb\xbfa\n\nb"):
        (tmp_path / "f.txt").write_bytes(content)
        whole = in_chunks(tmp_path / "f.txt", 1 << 20)[0]
        assert all(in_chunks(tmp_path / "f.txt", size)[0] == whole for size in range(1, 6))


def test_one_notion_of_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What str.strip leaves nothing of separates documents, wherever a file is cut."""
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace() and chr(code) not in "\n\r"]
    assert {"\u3000", "\u00a0", "\u0085", "\u2028", "\x1c"} < set(blanks)
    path = tmp_path / "f.txt"
    path.write_text("".join(f"text {number}\n {blank}\t\n" for number, blank in enumerate(blanks)), "utf-8", newline="")
    assert read(path) == ([[f"text {number}"] for number in range(len(blanks))], {})
    whole = in_chunks(path, 1 << 20)[0]
    monkeypatch.setattr("metro_megatron.text.documents.BUFFER_BYTES", 2)  # a block cuts characters
    assert all(in_chunks(path, size)[0] == whole for size in (4, 7, 20))
    path = tmp_path / "f.jsonl"
    path.write_bytes(json_lines("a") + "\u3000\u00a0\n".encode() + json_lines("b"))
    assert read(path) == ([["a"], ["b"]], {})


def test_long_windows_are_read(tmp_path: Path) -> None:
    content = json_lines(*(f"text {number}" for number in range(1000)))
    for log in (27, 28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, compression_level=1)
        compressor = zstandard.ZstdCompressor(
            compression_params=parameters
        ).compressobj()  # of unknown size, as in a pipe
        (tmp_path / "f.jsonl.zst").write_bytes(compressor.compress(content) + compressor.flush())
        documents, rejects = read(tmp_path / "f.jsonl.zst")
        assert (len(documents), rejects) == (1000, {})


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json.zst", "f.ndjson.bz2"])
def test_compressions_under_other_names(tmp_path: Path, compression: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[compression](json_lines("a", "b")))
    assert read(path) == ([["a"], ["b"]], {})


def test_text_under_the_name_of_a_compression_and_frames_to_be_skipped(tmp_path: Path) -> None:
    """As servers that unpack on the way, and pzstd, leave files."""
    for ending in COMPRESS:
        for content in (json_lines("\u00e9", "b"), b"\xef\xbb\xbf" + json_lines("\u00e9", "b")):
            (tmp_path / f"f.jsonl.{ending}").write_bytes(content)
            assert read(tmp_path / f"f.jsonl.{ending}") == ([["\u00e9"], ["b"]], {})
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00size"
    for name in ("g.jsonl.zst", "g.jsonl"):
        (tmp_path / name).write_bytes((skipped + COMPRESS["zst"](json_lines("a"))) * 2 + skipped)
        assert read(tmp_path / name) == ([["a"], ["a"]], {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.txt", "a\n\nb".encode("utf-32"), "is UTF-32 text; convert it .iconv -f UTF-32 -t UTF-8"),
        ("f.jsonl", b"PAR1....", "is a Parquet file; name it .parquet"),
        ("f.txt", b"\xfd7zXZ\x00", "compressed with xz"),
        ("f.txt", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("f.txt", "text, \u00e9".encode("utf-16-le"), "is UTF-16 text without a mark; .*UTF-16LE"),
        ("f.txt", "text, \u00e9".encode("utf-16-be"), "is UTF-16 text without a mark; .*UTF-16BE"),
        ("f.jsonl", '{"text": "a"}'.encode("utf-32-le"), "is UTF-32 text"),
        ("f.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "is compressed twice"),
        ("f.jsonl.gz", gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar  \0", mtime=0), "is a tar archive"),
    ],
)
def test_what_is_no_text_is_named_by_its_first_bytes(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / name}: .*{message}"):
        find_inputs([str(tmp_path)])


def test_text_that_only_looks_like_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"BZh9 is how bzip2 files begin")
    (tmp_path / "b.txt").write_bytes(b'[ {"text": 1} ]')
    (tmp_path / "c.jsonl").write_bytes(b'[1]\n{"text": "c"}\n')
    assert read(tmp_path) == ([["BZh9 is how bzip2 files begin"], ['[ {"text": 1} ]'], ["c"]], {"not_an_object": 1})


def test_marked_files_joined(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "f.jsonl").write_bytes((bom + json_lines("a")) + (bom + json_lines("b", "c")) + bom + b"\n" + bom)
    assert read(tmp_path / "f.jsonl") == ([["a"], ["b"], ["c"]], {})


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "binary"])
def test_one_string_that_is_not_utf8_loses_one_document(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = [f"row {number}".encode() for number in range(600)]
    raw[300] = b"\xff\xfe"
    column = pyarrow.array(raw, pyarrow.large_binary() if kind == "large_string" else pyarrow.binary())
    if kind != "binary":
        text = pyarrow.large_string() if kind == "large_string" else pyarrow.string()
        column = column.view(text)
    if kind == "dictionary":
        column = column.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "f.parquet")
    documents, rejects = read(tmp_path / "f.parquet")
    assert documents == [[f"row {number}"] for number in range(600) if number != 300]
    assert rejects == {"not_utf8": 1}


def test_columns_of_one_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    parquet.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(UserError, match="column text more than once"):
        read(tmp_path / "f.parquet")
