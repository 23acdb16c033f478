"""JSON arrays, JSON over several lines and UTF-16: the documents of JSON Lines; damage is counted by the record."""

import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from metro_megatron.errors import UserError
from metro_megatron.preprocess.run import PlanOptions, PreprocessOptions, preprocess
from metro_megatron.text import json_values
from metro_megatron.text.documents import ReadOptions, read_documents
from metro_megatron.text.inputs import find_inputs, plan_chunks
from metro_megatron.text.records import Reject

CHARACTERS = ['"', "\\", "{", "}", "[", "]", ",", ":", "\n", "é", "🙂", "a", " ", ', {"x":', "]\n{"]


def read(path: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    rejects: Counter[Reject] = Counter()
    files = find_inputs([str(path)])
    documents = ["\n".join(one.units) for one in read_documents(files, rejects, ReadOptions(**options))]
    return documents, {str(reason): count for reason, count in rejects.items()}


def raws(content: bytes, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch, limit: int = 10**6) -> list[Any]:
    monkeypatch.setattr(json_values, "_BUFFER_BYTES", buffer_bytes)
    records = json_values.json_values(io.BufferedReader(io.BytesIO(content)), limit)
    found = [(record.position, record.raw) for record in records]
    assert all(content[place : place + len(raw)] == raw for place, raw in found if isinstance(raw, bytes))
    return [raw for _, raw in found]


def value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(8 if depth < 4 else 6)
    if kind < 3:
        return generator.choice([None, True, False, 1, -2.5e-7, 10**15, float("inf")])
    if kind < 6:
        return "".join(generator.choices(CHARACTERS, k=generator.randrange(30)))
    if kind == 6 and depth:
        return [value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return {f"k{number}": value(generator, depth + 1) for number in range(generator.randrange(4))}


def test_values_of_arrays_in_buffers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    spaces: list[tuple[str, str]] = [(",", ":"), (" ,  ", " :\n"), ("\n,\r\n\t", ": ")]
    for _ in range(300):
        values = [value(generator) for _ in range(generator.randrange(6))]
        layout = {"indent": generator.choice([None, 0, 2]), "separators": generator.choice(spaces)}
        text = json.dumps(values, ensure_ascii=generator.random() < 0.5, **layout)
        content = generator.choice([b"", b"\xef\xbb\xbf", b" \r\n" * 20]) + text.encode()
        size = generator.choice([1, 2, 3, 7, 16, 1000])
        assert list(map(json.loads, raws(content * 2, size, monkeypatch))) == values * 2
        objects = [one for one in values if isinstance(one, dict)]
        lines = "\n".join(json.dumps(one, indent=2) for one in objects).encode()
        assert list(map(json.loads, raws(lines, size, monkeypatch))) == objects
        cut = content[: generator.randrange(content.index(b"["), len(content))].rstrip()
        assert (raws(cut, size, monkeypatch) or [Reject.CUT_OFF])[-1] == Reject.CUT_OFF


def damaged(generator: random.Random, record: bytes) -> bytes:
    content, place = bytearray(record), generator.randrange(len(record))
    kind = generator.randrange(3)
    if kind == 0:
        content[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del content[place : place + generator.randrange(1, 20)]
    else:
        content[place:place] = generator.choice([b'"', b"{", b"}", b"[", b"]", b"\\", b",", b"\0"])
    return bytes(content)


def test_damage_of_a_record_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(2)
    objects = [{"id": number, "text": f'Text {number} {{with}} [all] "kinds" \n'} for number in range(8)]
    for _ in range(1000):
        indent, number = generator.choice([None, 2]), generator.randrange(len(objects))
        parts = [json.dumps(one, indent=indent).encode() for one in objects]
        parts[number] = damaged(generator, parts[number])
        found = raws(b"[" + b", ".join(parts) + b"]", generator.choice([1, 5, 64, 1000]), monkeypatch)
        whole = [json.loads(part) for part in parts[:number] + parts[number + 1 :]]
        assert [one for one in _parsed(found) if one in whole] == whole, parts[number]


def _parsed(found: list[Any]) -> Iterator[Any]:
    for raw in found:
        try:
            yield json.loads(raw)
        except (TypeError, ValueError):
            continue


def test_long_and_deep_values_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    after = b', {"a": 1}]'
    long = b'{"a": "' + b'\\"x' * 10_000 + b'"}'
    assert raws(b"[" + long + after, 100, monkeypatch, limit=2000) == [Reject.TOO_LONG, b'{"a": 1}']
    deep = b'[{"a": ' + b"[" * 50_000
    assert raws(deep, 1000, monkeypatch, limit=2000) == [Reject.INVALID_JSON, Reject.CUT_OFF]
    assert len(raws(b'[{"a":"b"  , {"text": ' * 1000 + after, 1 << 20, monkeypatch)) == 1002, "not in squares of it"


TEXTS = [f'Text {number}, with an é, a 🙂 and "quotes" in {{}}.' for number in range(200)]
OBJECTS = [{"id": number, "text": text, "meta": [{"text": "inner"}]} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in OBJECTS)
ARRAY = json.dumps(OBJECTS, ensure_ascii=False)
PRETTY = json.dumps(OBJECTS, ensure_ascii=False, indent=4)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-16-be-sig"])
def test_forms_of_the_same_text(tmp_path: Path, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    def encoded(text: str) -> bytes:
        name = encoding.removesuffix("-sig") if "16" in encoding else encoding
        mark = "\ufeff" if encoding.endswith("be-sig") else ""
        return compress((mark + text).encode(name))

    over_lines = "\r\n".join(json.dumps(one, indent=1) for one in OBJECTS)
    comma_first = "\n".join(f'{{ "text": {json.dumps(text)}\n, "id": 1 }}' for text in TEXTS)
    long_line = "\n".join(f'{{"long": "{5000 * "x"}",\n "text": {json.dumps(text)}}}' for text in TEXTS)
    behind_blanks = " \n" * 5000 * (encoding not in ("utf-16-le", "utf-16-be")) + ARRAY
    texts = [LINES, ARRAY, PRETTY, f"\n\t {PRETTY}\n", ARRAY + PRETTY[:-1] + "\n]", over_lines]
    texts += [comma_first, long_line, behind_blanks, LINES.replace("\n", ""), PRETTY.replace("\n", "\r")]
    for text in texts:
        (tmp_path / "f.json").write_bytes(encoded(text))
        times = 2 if text.startswith(ARRAY) and len(text) > len(ARRAY) else 1
        assert read(tmp_path / "f.json") == (TEXTS * times, {})
        (file,) = find_inputs([str(tmp_path)])
        is_whole = text != LINES or "16" in encoding or compress is not bytes
        assert len(plan_chunks([file], 1000)) == 1 or not is_whole
    if encoding not in ("utf-16-le", "utf-16-be"):  # without a mark, nothing tells what plain text is
        (tmp_path / "f.txt").write_bytes(encoded("\r\n \u3000\r\n".join(TEXTS)))
        assert read(tmp_path / "f.txt") == (TEXTS, {})


def test_several_objects_in_any_line(tmp_path: Path) -> None:
    path, lines = tmp_path / "f.jsonl", LINES.splitlines()
    inside = json.dumps({"text": "one } {", "id": 1})
    for between in (" ", "", "\x1e"):
        pairs = [one + between + other for one, other in zip(lines[1::2], lines[2::2], strict=False)]
        path.write_text("\n".join([lines[0], *pairs[:50], inside, *pairs[50:], lines[-1]]))
        texts = [*TEXTS[:101], "one } {", *TEXTS[101:]]
        assert read(path) == (texts, {})
        (file,) = find_inputs([str(path)])
        assert len(plan_chunks([file], 1000)) > 10, "others need not be read from the start"
    path.write_text(f'{lines[0]}\n{{"text": "a"}} {{"text": \n{lines[1]}')
    assert read(path) == ([TEXTS[0], "a", TEXTS[1]], {"cut_off": 1})


@pytest.mark.parametrize("indent", [None, 1])
def test_sequences_of_rfc_7464(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "f.json"
    path.write_text("".join(f"\x1e{json.dumps(one, indent=indent)}\n" for one in OBJECTS))
    assert read(path) == (TEXTS, {})


@pytest.mark.parametrize(
    ("begin", "end", "what"),
    [
        ("callback(", ");", "JavaScript"),
        ("/**/ jQuery.cb_1({'docs': ", "});", "JavaScript"),
        ("\ufeffwindow.YTD.part0 = ", "", "JavaScript"),
        ("var data=", ";", "JavaScript"),
        (")]}',\n", "", "JavaScript"),
        ("for(;;);", "", "JavaScript"),
        ("\n<!DOCTYPE html>", "", "HTML"),
        ("event: x\ndata: ", "", None),
        ("data: ", "", "stream of events"),
        ("{'text': 'a'}\n", "", "Python"),
    ],
)
def test_what_stands_around_json_is_named(tmp_path: Path, begin: str, end: str, what: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(begin + ARRAY + end)
    with pytest.raises(UserError, match=what):
        read(path)
    (tmp_path / "f.txt").write_text(begin + ARRAY + end)
    assert len(read(tmp_path / "f.txt")[0]) == 1, "text may begin with anything"


def test_broken_characters_of_utf16_cost_their_record(tmp_path: Path) -> None:
    halves = (
        LINES.replace("Text 7,", "Text \ud83d 7,")
        .replace("Text 9,", "Text \ude42 9,")
        .encode("utf-16", "surrogatepass")
    )
    (tmp_path / "f.jsonl").write_bytes(halves)
    others = [text for number, text in enumerate(TEXTS) if number not in (7, 9)]
    assert read(tmp_path / "f.jsonl") == (others, {"not_utf8": 2})
    (tmp_path / "f.jsonl").write_bytes(LINES.encode("utf-16")[:-3])
    assert read(tmp_path / "f.jsonl") == (TEXTS[:-1], {"not_utf8": 1})
    (tmp_path / "f.jsonl").unlink()
    (tmp_path / "f.txt").write_bytes("a\n\nb\ud800\n\nc".encode("utf-16", "surrogatepass") + b"\n")
    assert read(tmp_path / "f.txt") == (["a"], {"not_utf8": 2})


def test_cut_off_and_damaged_arrays_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(ARRAY[: ARRAY.index("Text 50,")])
    assert read(path) == (TEXTS[:50], {"cut_off": 1})
    path.write_text(f"{ARRAY[:-1]}, null, 3, [{{}}], {json.dumps({'text': ' '})}")
    assert read(path) == (TEXTS, {"not_an_object": 2, "missing_key": 1, "empty": 1, "cut_off": 1})
    path.write_bytes(ARRAY.encode().replace(b"Text 8,", b"Text \xff8,").replace(b"Text 5,", b"Text \x015,"))
    kept = [text for number, text in enumerate(TEXTS) if number not in (5, 8)]
    assert read(path) == (kept, {"not_utf8": 1, "invalid_json": 1})
    assert read(path, max_document_bytes=60) == ([], {"too_long": 200})


def test_arrays_of_anything_are_counted_by_the_value(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    nested = json.dumps([OBJECTS[:100], [OBJECTS[100:]]], indent=1)
    for text in (nested, "\ufeff" + nested, json.dumps([OBJECTS[:100], [OBJECTS[100:]]])):
        path.write_text(text)
        assert read(path) == (TEXTS, {})
    for values in (["a", "b", '"]'], [1, -2.5, None], [["a"], [["b"], []], True]):
        for indent in (None, 1):
            path.write_text(json.dumps(values, indent=indent))
            assert read(path) == ([], {"not_an_object": 3})
    path.write_text('["a", "b"]\n["c", "d"]\n')  # records of JSON Lines
    assert read(path) == ([], {"not_an_object": 2})


def test_datasets_are_those_of_json_lines(tmp_path: Path, tokenizer_folder: Path) -> None:
    contents = []
    for name, content in (("a.jsonl", LINES.encode()), ("b.json", PRETTY.encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        plan = PlanOptions(chunk_bytes=5000)
        preprocess(PreprocessOptions([str(tmp_path / name)], str(tokenizer_folder), str(tmp_path / name[0]), plan))
        contents.append([(tmp_path / f"{name[0]}_00000.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert contents[0] == contents[1]
