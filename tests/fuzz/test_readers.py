"""Readers of text on damaged, foreign and odd files: content, counts or one line a problem, and nothing else.

FUZZ says how many examples each property gets; `make fuzz` sets many.
"""

import bz2
import gzip
import io
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metro_megatron.errors import UserError
from metro_megatron.text.documents import ReadOptions, read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.text.records import Reject

FUZZ = int(os.environ.get("FUZZ", 20))
fuzzed = settings(
    max_examples=FUZZ,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXTS = [f"Text number {number}, with an é and a 🙂." for number in range(30)]
OBJECTS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
JSON_LINES = b"".join(json.dumps(one).encode() + b"\n" for one in OBJECTS)
PLAIN = "\n\n".join(TEXTS).encode()


def parquet_file() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, file, row_group_size=7, write_page_checksum=True)
    return file.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "f.jsonl": lambda: JSON_LINES,
    "f.txt": lambda: PLAIN,
    "array.json": lambda: json.dumps(OBJECTS, indent=1).encode(),
    "utf16.jsonl": lambda: JSON_LINES.decode().encode("utf-16"),
    "utf16.json.gz": lambda: gzip.compress(json.dumps(OBJECTS).encode("utf-16"), mtime=0),
    "f.jsonl.gz": lambda: gzip.compress(JSON_LINES, mtime=0),
    "f.txt.zst": lambda: zstandard.ZstdCompressor(write_checksum=True).compress(PLAIN),
    "f.jsonl.bz2": lambda: bz2.compress(JSON_LINES),
    "f.parquet": parquet_file,
}


def read(path: Path, **options) -> tuple[list[str], Counter[Reject]] | UserError:
    """Documents and rejects, or the refusal, whose problems are a line each."""
    rejects: Counter[Reject] = Counter()
    try:
        files = find_inputs([str(path)])
        return ["\n".join(one.units) for one in read_documents(files, rejects, ReadOptions(**options))], rejects
    except UserError as error:
        assert error.problems and all(problem.strip() and "\n" not in problem for problem in error.problems)
        return error


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Flipped bits, cuts, zeroed, doubled, moved or foreign bytes, as disks, networks and tools leave them."""
    kind = draw(st.sampled_from(["flip", "cut", "zero", "double", "foreign", "swap", "append"]))
    places = [draw(st.floats(0, 1)) for _ in range(2)]
    bit, foreign = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=20))

    def damage(content: bytes) -> bytes:
        begin, end = sorted(int(place * len(content)) for place in places)
        begin = min(begin, len(content) - 1)
        inner = content[begin:end]
        return {
            "flip": content[:begin] + bytes([content[begin] ^ 1 << bit]) + content[begin + 1 :],
            "cut": content[:begin],
            "zero": content[:begin] + bytes(len(inner)) + content[begin + len(inner) :],
            "double": content[:end] + inner + content[end:],
            "foreign": content[:begin] + foreign + content[begin:],
            "swap": content[end:] + content[:end],
            "append": content + foreign,
        }[kind]

    return damage


def _beside_texts(document: str) -> str:
    for text in TEXTS:
        document = document.replace(text, "")
    return document


@pytest.mark.parametrize("name", FILES)
@fuzzed
@given(damage=damages())
def test_damaged_files(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    whole = FILES[name]()
    path.write_bytes(damage(whole))
    found = read(path)
    if damage(whole) == whole:
        assert found == (TEXTS, Counter())
    elif not isinstance(found, UserError) and name.endswith((".gz", ".zst", ".bz2", ".parquet")):
        # Formats with checksums: what is read is what was written, some of it more than once.
        assert all(not _beside_texts(document) for document in found[0])


@pytest.mark.parametrize("name", ["f.jsonl", "f.txt"])
@fuzzed
@given(line=st.integers(0, len(TEXTS) - 1), foreign=st.binary(max_size=40))
def test_damage_of_a_record_leaves_the_others(tmp_path: Path, name: str, line: int, foreign: bytes) -> None:
    separator = b"\n" if "json" in name else b"\n\n"
    records = FILES[name]().rstrip(b"\n").split(separator)
    records[line] = b"x" + foreign.replace(b"\n", b"").replace(b"\r", b"")
    path = tmp_path / name
    path.write_bytes(separator.join(records))
    found = read(path)
    assert not isinstance(found, UserError), found
    others = [text for number, text in enumerate(TEXTS) if number != line]
    assert [text for text in found[0] if text in others] == others
    assert len(found[0]) + found[1].total() == len(TEXTS)


@fuzzed
@given(content=st.binary(max_size=300), name=st.sampled_from(sorted(FILES)))
def test_any_bytes_under_any_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    read(tmp_path / name)
    (tmp_path / name).unlink()


@fuzzed
@given(
    values=st.lists(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.lists(st.text(), max_size=3)
        | st.dictionaries(st.text(), st.integers(), max_size=2),
        max_size=20,
    ),
    key=st.text(),
)
def test_objects_of_all_kinds(tmp_path: Path, values: list, key: str) -> None:
    lines = [json.dumps({"text": value} if number % 3 else {key: value}) for number, value in enumerate(values)]
    (tmp_path / "f.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = read(tmp_path / "f.jsonl")
    assert not isinstance(found, UserError) and len(found[0]) + found[1].total() == len(values)


def test_names_and_types_of_files(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(JSON_LINES)
    os.mkfifo(tmp_path / "pipe.jsonl")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.txt"))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "inner.txt").write_bytes(PLAIN)
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "itself.jsonl").symlink_to("itself.jsonl")
    (tmp_path / "a\nb.jsonl").write_bytes(JSON_LINES)
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.txt")).write_bytes(PLAIN)
    found = read(tmp_path)
    listening.close()
    assert isinstance(found, UserError) and len(found.problems) == 6
    text = str(found)
    for part in (
        "pipe.jsonl: is no file, but a pipe",
        "socket.txt: is no file, but a pipe, socket or device",
        "dangling.txt: cannot be read (No such file",
        "itself.jsonl: cannot be read (Too many levels",
        "a\\nb.jsonl': the name has characters",
        "\\udcff.txt': the name has characters",
    ):
        assert part in text, text
    assert read(tmp_path / "folder.jsonl") == (TEXTS, Counter())


def under_limit(code: str, megabytes: int) -> str:
    """What a program prints that may have so much memory."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2)\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", limit + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout


_READ = """
from collections import Counter
from metro_megatron.text.documents import read_documents
from metro_megatron.text.inputs import find_inputs
rejects = Counter()
print([one.units for one in read_documents(find_inputs([{path!r}]), rejects)], dict(rejects))
"""


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
@pytest.mark.long
def test_a_line_of_a_gigabyte_in_a_gigabyte_of_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"f.{ending}"
    with path.open("wb") as file:
        file.seek(1 << 30)  # a hole, which reads as NULs
        file.write(b"\n\n" + (json.dumps({"text": "short"}).encode() if ending == "jsonl" else b"short"))
    assert under_limit(_READ.format(path=str(path)), 1024) == "[['short']] {<Reject.TOO_LONG: 'too_long'>: 1}\n"


def test_a_window_beyond_the_memory_is_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(JSON_LINES) + compressor.flush())
    code = f"try:\n    exec({_READ.format(path=str(path))!r})\nexcept Exception as error:\n    print(repr(error))"
    printed = under_limit(code, 1024)
    assert "UserError" in printed and "needs more memory than there is" in printed and "damaged" not in printed


@pytest.mark.long
def test_many_small_files(tmp_path: Path) -> None:
    count = 20_000
    for number in range(count):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(b'{"text": "a"}\n')
    found = read(tmp_path)
    assert not isinstance(found, UserError) and found[0] == ["a"] * count
