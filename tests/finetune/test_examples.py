"""Labelled files, good and hostile."""

from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts
from metro_megatron.finetune.tasks.classification import label_names


def write(path: Path, contents: str | bytes) -> Path:
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def test_csv_with_quotes_commas_newlines_and_bom(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffid,text,label\r\n1,"a ""b"", c\nd",pos\r\n2,,neg\r\n')
    assert read_labelled_texts(path) == LabelledTexts(['a "b", c\nd', ""], None, ["pos", "neg"], ["1", "2"])


def test_tsv_and_jsonl_pairs(tmp_path: Path) -> None:
    tsv = write(tmp_path / "a.tsv", "text_a\ttext_b\tlabel\nx, y\tz\t1\n")
    assert read_labelled_texts(tsv) == LabelledTexts(["x, y"], ["z"], ["1"])
    lines = '{"text_a": "ä", "text_b": "b", "label": 0}\n\n{"label": 10, "text_b": "d", "text_a": "c"}\n'
    assert read_labelled_texts(write(tmp_path / "a.jsonl", lines)) == LabelledTexts(["ä", "c"], ["b", "d"], ["0", "10"])


HOSTILE = {
    "empty.csv": ("", "holds no rows"),
    "header.csv": ("text,label\n", "holds no rows"),
    "empty.jsonl": ("\n\n", "holds no rows"),
    "columns.csv": ("sentence,label\na,1\n", "has columns sentence, label; needs text and label"),
    "half.csv": ("text_a,label\na,1\n", "needs text and label, or text_a, text_b and label"),
    "fields.csv": ("text,label\na,b,1\n", "line 2: has 3 fields, the header 2; quote"),
    "short.csv": ("text,label\na,1\nb\n", "line 3: has no label"),
    "quote.csv": ('text,label\n"a,1\n', "not readable as CSV"),
    "null.csv": (b"text,label\na\xff,1\n", "not UTF-8 at byte 12"),
    "json.jsonl": ('{"text": "a", "label": 1}\n{"text": "b"', "line 2: not one JSON object a line"),
    "array.jsonl": ('["a", 1]\n', "line 1: is a list"),
    "float.jsonl": ('{"text": "a", "label": 0.5}\n', "line 1: label 0.5 is not a class"),
    "none.jsonl": ('{"text": null, "label": 1}\n', "line 1: text is None, must be a string"),
    "nolabel.jsonl": ('{"text": "a", "label": null}\n', "line 1: has no label"),
    "notext.jsonl": ('{"text": "a", "label": 1}\n{"label": 1}\n', "line 2: has no text"),
    "ignored.csv": ("text,label\na,-100\nb,1\n", "line 2: label is -100, which transformers takes for none"),
    "deep.jsonl": ('{"text": "a", "label": ' + "[" * 100_000, "line 1: not one JSON object a line .*recursion"),
    "data.parquet": ("PAR1", "not a readable Parquet file"),
    "data.xlsx": ("PK", r"must be named \.csv"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_explained(tmp_path: Path, name: str) -> None:
    contents, message = HOSTILE[name]
    with pytest.raises(UserError, match=message):
        read_labelled_texts(write(tmp_path / name, contents))


def test_many_bad_rows_are_counted_not_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "a,\n" * 30 + "b,1\n")
    with pytest.raises(UserError) as raised:
        read_labelled_texts(path)
    assert len(raised.value.problems) == 6
    assert raised.value.problems[-1].endswith("30 such rows of 31")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_labelled_texts(tmp_path / "a.csv")


def texts(*labels: str, second: list[str] | None = None) -> LabelledTexts:
    return LabelledTexts(["x"] * len(labels), second, list(labels))


def test_labels_are_ordered_and_checked() -> None:
    assert label_names(texts("10", "9", "-1"), texts("9")) == ["-1", "9", "10"]
    assert label_names(texts("b", "a", "10"), texts("a")) == ["10", "a", "b"]
    with pytest.raises(UserError, match="all 2 training texts have the label 'a'"):
        label_names(texts("a", "a"), texts("a"))
    with pytest.raises(UserError, match="2 validation labels are not in the training file: 'c', 'd'"):
        label_names(texts("a", "b"), texts("c", "d", "a"))
    with pytest.raises(UserError, match="two of a kind"):
        label_names(texts("a", "b"), texts("a", second=["y"]))
