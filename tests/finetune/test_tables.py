"""Tables as people have them: every form gives the same rows, and what would be misread is refused."""

import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts, read_labelled_texts
from metro_megatron.finetune.questions import answers_of
from metro_megatron.finetune.tables import Layout, read_table
from metro_megatron.finetune.tasks.classification import Classification, label_names
from metro_megatron.finetune.tasks.multi_label import MultiLabel
from metro_megatron.finetune.tasks.multiple_choice import Choice, MultipleChoice
from metro_megatron.finetune.tasks.regression import Regression
from metro_megatron.finetune.tasks.span import Span
from metro_megatron.finetune.tasks.token import TaggedWords, Token

ROWS = [{"text": "a; b, c|d", "label": "x"}, {"text": 'é "q"\n\nend', "label": "y"}]
PLACES = ["line 2", "line 3"]


def write(path: Path, contents: str | bytes) -> Path:
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def delimited(delimiter: str) -> str:
    quoted = (['"' + row[name].replace('"', '""') + '"' for name in ("text", "label")] for row in ROWS)
    return "\n".join(delimiter.join(fields) for fields in (["text", "label"], *quoted)) + "\n"


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "a.csv": (delimited(","), PLACES),
    "b.csv": ("\ufeff" + delimited(";").replace("text;label", " text ;label;").replace('"x"', '"x";'), PLACES),
    "c.csv": ("\n\n" + delimited("|"), ["line 4", "line 5"]),
    "d.tsv": (delimited("\t").replace("\n", "\r\n").replace("\r\n\r\nend", "\n\nend"), PLACES),
    "e.tsv": (delimited(","), PLACES),
    "f.jsonl": ("\n" + LINES, PLACES),
    "g.json": (LINES, ["line 1", "line 2"]),
    "h.json": (json.dumps(ROWS, indent=2), ["row 1", "row 2"]),
    "i.csv.gz": (gzip.compress(delimited(",").encode()), PLACES),
    "j.jsonl.gz": (gzip.compress(LINES.encode()), ["line 1", "line 2"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_rows_and_their_lines(tmp_path: Path, name: str) -> None:
    contents, places = FORMS[name]
    rows = read_table(write(tmp_path / name, contents))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == places


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [1.0, 0.0], "tokens": [["x"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    rows = read_table(tmp_path / "a.parquet")
    assert rows == [
        ("row 1", {"text": "a", "label": 1.0, "tokens": ["x"]}),
        ("row 2", {"text": "b", "label": 0.0, "tokens": []}),
    ]
    # Classes that pandas has made floats of.
    assert read_labelled_texts(tmp_path / "a.parquet").labels == ["1", "0"]


def test_a_row_of_several_lines_does_not_shift_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo\n\nthree",x\n\nfour,\nfive,x\n"six\n",\n')
    with pytest.raises(UserError) as caught:
        read_labelled_texts(path)
    assert caught.value.problems == [f"{path}, line 7: has no label", f"{path}, line 9: has no label"]


def test_delimiter_and_quotes_may_be_named(tmp_path: Path) -> None:
    # The header has most commas, yet it is a table of tildes.
    path = write(tmp_path / "a.csv", 'my, long, text~label\n"a~x\n')
    rows = read_table(path, Layout(delimiter="~", unquoted=True))
    assert [row.values for row in rows] == [{"my, long, text": '"a', "label": "x"}]
    assert Layout(delimiter="ab").problems() and Layout(delimiter='"').problems() and not Layout().problems()


REFUSED = {
    "twice.csv": ("text,label,text\na,x,b\n", "the header has 'text' 2 times; rename"),
    "twice.jsonl": ('{"text": "a", "label": 1, "label": 2}\n', "line 1: an object has 'label' 2 times"),
    "twice.json": ('[{"text": "a", "label": 1, "label": 2}]', "an object has 'label' 2 times"),
    "open.csv": ('text,label\na,x\n"b,x\nc,y\n', "line 3: not readable as CSV .*--unquoted"),
    "more.csv": ("text,label\na,x\nb, c,y\n", "line 3: has 3 fields, the header 2; quote"),
    "columns.csv": ("review;stars\na;1\n", "has columns review, stars; needs text and label.*--text_columns"),
    "cut.csv.gz": (gzip.compress(b"text,label\na,x\n" * 99)[:-20], "not readable as gzip"),
    "plain.csv.gz": ("text,label\na,x\n", "not readable as gzip"),
    "item.json": ('[{"text": "a", "label": 1}, 5]', "row 2: is a int, must be an object"),
    "broken.json": ('[{"text": "a"}', "not a JSON array"),
    "utf16.csv": ("text,label\na,x\n".encode("utf-16"), "not UTF-8 at byte 0"),
    "blank.csv": ("text,label\na, \n", "line 2: has no label"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_misread_is_refused(tmp_path: Path, name: str) -> None:
    contents, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        read_labelled_texts(write(tmp_path / name, contents))


def test_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,review,title,stars\n7,good film,a,5\n")
    layout = Layout(text_columns=["title", "review"], label_columns=["stars"])
    assert read_labelled_texts(path, layout=layout) == LabelledTexts(["a"], ["good film"], ["5"], ["7"])
    unlabelled = read_labelled_texts(path, layout=layout, is_labelled=False)
    assert unlabelled == LabelledTexts(["a"], ["good film"], [], ["7"])
    with pytest.raises(UserError, match="text_columns is a b c; give one column, or two"):
        read_labelled_texts(path, layout=Layout(text_columns=["a", "b", "c"]))
    with pytest.raises(UserError, match="label_columns is a b; this task takes one"):
        read_labelled_texts(path, layout=Layout(label_columns=["a", "b"]))


def texts(*labels: str) -> LabelledTexts:
    return LabelledTexts([f"text {i}" for i in range(len(labels))], None, list(labels))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["neg", "neg ", "NEG", "pos"], ["pos"], "'NEG', 'neg', 'neg ' differ only in case, white space"),
        (["neg", "pos"], ["Neg"], "'Neg', 'neg' differ only"),
        (["1", "0", "1.0"], ["0"], "'1', '1.0' differ only .* how a number is written"),
        (["a b", "a\u00a0b"], ["a b"], "differ only"),
        (["caf\u00e9", "cafe\u0301"], ["caf\u00e9"], r"'cafe\\u0301', 'caf\\xe9' differ only"),
        (["neg", "neg\u200b", "ｎｅｇ"], ["neg"], r"'neg', 'neg\\u200b', 'ｎｅｇ' differ only"),
        (["3,8", "4,2", "4"], ["4"], "3 different numbers such as 3,8: scores"),
        (["3.8", "5", "0.25"], ["5"], "3 different numbers such as 0.25: scores, which --task regression learns"),
        ([f"id{i}" for i in range(100)], ["id1"], "100 training texts have 100 different labels, too many"),
        (["a", "b"], ["c"], "1 validation labels are not in the training file: 'c'; it has 'a', 'b'"),
    ],
)
def test_labels_that_are_no_classes(train: list[str], validation: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_names(texts(*train), texts(*validation))


def test_labels_that_are_classes() -> None:
    assert label_names(texts("1.0", "2.0"), texts("2.0")) == ["1.0", "2.0"]
    assert label_names(texts("1_0", "10"), texts("10")) == ["10", "1_0"]
    many = [str(i % 60) for i in range(200)]
    assert len(label_names(texts(*many), texts("7"))) == 60


def test_the_same_examples_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "a.csv", "text,label\na,x\nb,y\nc,x\n")
    copy = write(tmp_path / "b.jsonl", '{"text": "c", "label": "x"}\n{"text": "a", "label": "y"}\n')
    for validation, count in ((train, 3), (copy, 2)):
        with pytest.raises(
            UserError, match=f"all {count} texts are in .*a.csv too; give texts that are not learned from"
        ):
            Classification.read(train, validation)
    half = write(tmp_path / "c.csv", "text,label\na,x\nd,y\n")
    Classification.read(train, half)
    assert f"{half}: 1 of 2 texts are in {train} too" in capsys.readouterr().out


def test_multi_label_in_every_form(tmp_path: Path) -> None:
    expected = LabelledTexts(["t", "u", "v"], None, [("a", "b"), (), ("b",)])
    lists = write(
        tmp_path / "a.jsonl",
        "".join(
            json.dumps({"text": text, "labels": labels}) + "\n"
            for text, labels in (("t", ["a", "b"]), ("u", []), ("v", ["b"]))
        ),
    )
    fields = write(tmp_path / "b.csv", "text,labels\nt,a; b\nu,\nv,b\n")
    marks = write(tmp_path / "c.csv", "text,a,b\nt,1,1\nu,0,0.0\nv,False,true\n")
    assert MultiLabel.read_examples(lists) == expected
    assert MultiLabel.read_examples(fields) == expected
    assert MultiLabel.read_examples(marks, Layout(label_columns=["a", "b"])) == expected
    commas = write(tmp_path / "d.csv", "text;labels\nt;a,b\nu;\nv;b\n")
    assert MultiLabel.read_examples(commas) == expected
    with pytest.raises(UserError, match="line 2: a is '2', must be 0 or 1"):
        MultiLabel.read_examples(write(marks, "text,a,b\nt,2,1\n"), Layout(label_columns=["a", "b"]))
    task = MultiLabel(expected, expected)
    assert task.settings()["id2label"] == {0: "a", 1: "b"}
    for train, message in (
        ([(), ()], "no training text has a label"),
        ([("a",), ("a",)], "all training texts have all labels"),
        ([("a",), ("A",)], "'A', 'a' differ only"),
    ):
        with pytest.raises(UserError, match=message):
            MultiLabel(LabelledTexts(["t", "u"], None, train), LabelledTexts(["v"], None, [("a",)])).settings()


def test_tagged_words_in_every_form(tmp_path: Path) -> None:
    expected = [TaggedWords(("the", "cat"), ("O", "B-X")), TaggedWords(("it",), ("O",))]
    lines = [{"tokens": list(one.words), "tags": list(one.tags or ())} for one in expected]
    lists = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    fields = write(tmp_path / "b.tsv", "words\tner\nthe cat\tO B-X\nit\tO\n")
    assert Token.read_examples(lists) == expected
    assert Token.read_examples(fields, Layout(text_columns=["words"], label_columns=["ner"])) == expected
    for line, message in (
        ('{"tokens": ["a", "b"], "tags": ["O"]}', "line 1: tokens has 2 words, tags 1"),
        ('{"tokens": [], "tags": []}', r"tokens is \[\], must be a list"),
        ('{"tokens": [1], "tags": ["O"]}', "tokens holds what is not a string"),
        ('{"tokens": "a", "tags": 5}', "tags is 5, must be a list"),
    ):
        with pytest.raises(UserError, match=message):
            Token.read_examples(write(lists, line + "\n"))


def test_lines_of_a_token_each(tmp_path: Path) -> None:
    """CoNLL-2003's, WNUT's with tabs, and such with comments; read by the places of their columns, too."""
    expected = [TaggedWords(("EU", "rejects", "#"), ("B-ORG", "O", "O")), TaggedWords(("it",), ("O",))]
    conll = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n# NN I-NP O\n \n\nit PRP I-NP O"
    wnut = "EU\tB-ORG\r\nrejects\tO\r\n#\tO\r\n\t\r\nit\tO\r\n"
    comments = "# id 1 domain=en\nEU _ B-ORG\nrejects _ O\n# _ O\n\n# id 2 domain=en\nit _ O\n"
    for name, text in (("a.conll", conll), ("b.txt", conll), ("c.conll", wnut), ("d.bio", comments)):
        assert Token.read_examples(write(tmp_path / name, text)) == expected, name
    path = tmp_path / "e.conll.gz"
    path.write_bytes(gzip.compress(conll.encode()))
    (parts, _) = Token.read_examples(path, Layout(text_columns=["1"], label_columns=["2"]))
    assert parts.tags == ("NNP", "VBZ", "NN")
    alone = write(tmp_path / "f.conll", "EU\nrejects\n#\n\nit\n")
    assert [one.words for one in Token.read_examples(alone, is_labelled=False)] == [one.words for one in expected]
    with pytest.raises(UserError, match="has columns tokens, 1; needs tokens and tags"):
        Token.read_examples(alone)
    with pytest.raises(UserError, match="line 3: has 1 columns, most lines 2; a line holds a token and its tag"):
        Token.read_examples(write(alone, "a O\n\nb\nc O\n"))
    with pytest.raises(UserError, match="holds no rows"):
        Token.read_examples(write(alone, "\n \n"))


def test_choices_in_every_form(tmp_path: Path) -> None:
    lists = write(tmp_path / "a.jsonl", '{"text": "t", "choices": ["x", "y"], "label": 1}\n')
    columns = write(tmp_path / "b.csv", "story,ask,A,B,answer\nt,why?,x,y,B\n")
    assert MultipleChoice.read_examples(lists) == [Choice("t", ("x", "y"), 1)]
    layout = Layout(text_columns=["story", "ask"], choice_columns=["A", "B"], label_columns=["answer"])
    assert MultipleChoice.read_examples(columns, layout) == [Choice("t", ("why? x", "why? y"), 1)]
    for line, message in (
        ('{"text": "t", "choices": ["x"], "label": 0}', "choices is .*, must be a list of two strings or more"),
        ('{"text": "t", "choices": ["x", "y"], "label": 2}', "label 2 is none of 2 choices; they count from 0"),
        ('{"text": "t", "choices": ["x", "y"], "label": "y y"}', "label 'y y' is none of 2 choices"),
    ):
        with pytest.raises(UserError, match=message):
            MultipleChoice.read_examples(write(lists, line + "\n"))
    fewer = write(tmp_path / "c.csv", "text,A,B,C,label\nt,x,y,z,C\nt,x,y,,B\n")
    found = MultipleChoice.read_examples(fewer, Layout(choice_columns=["A", "B", "C"]))
    assert found == [Choice("t", ("x", "y", "z"), 2), Choice("t", ("x", "y"), 1)]
    task = MultipleChoice(found, found)
    assert task.settings() == {"num_labels": 1} and task.describe_labels() == "2 to 3 choices"
    outputs = (np.array([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], dtype=np.float32),)  # the last is no choice of the second
    assert task.scores(outputs, [{"label": 2}, {"label": 1}]) == {"accuracy": 1.0}
    assert [len(line["probabilities"]) for line in task.predictions(outputs, [])] == [3, 2]
    for line, message in (("t,x,,z,A", "line 2: B is empty, C is not"), ("t,x,y,,C", "'C' is none of 2 choices")):
        with pytest.raises(UserError, match=message):
            MultipleChoice.read_examples(
                write(fewer, f"text,A,B,C,label\n{line}\n"), Layout(choice_columns=["A", "B", "C"])
            )


def test_questions_in_every_form(tmp_path: Path) -> None:
    squad = write(
        tmp_path / "a.jsonl",
        json.dumps(
            {"question": "q", "context": "old cat", "answers": {"text": ["cat"], "answer_start": [4]}, "id": "7"}
        ),
    )
    strings = write(tmp_path / "b.csv", "ask,passage,answer,begin\nq,old cat,cat,4\nr,old cat,,\n")
    (one,) = Span.read_examples(squad)
    assert (one.answers, one.id) == ((("cat", 4),), "7")
    layout = Layout(text_columns=["ask", "passage"], label_columns=["answer", "begin"])
    assert [one.answers for one in Span.read_examples(strings, layout)] == [(("cat", 4),), ()]
    with pytest.raises(UserError, match="b.csv, line 2: answer 'cat' is not in its context"):
        Span.read_examples(write(strings, "question,context,answer\nq,old Cat,cat\n"))
    with pytest.raises(UserError, match="span takes two text_columns"):
        Span.read_examples(strings, Layout(text_columns=["a"]))
    answered, impossible = (
        Span.read_examples(squad),
        Span.read_examples(write(strings, "question,context,answer\nq,c,\n")),
    )
    with pytest.raises(UserError, match="none of 1 training questions has an answer"):
        Span(impossible, answered).settings()
    with pytest.raises(UserError, match="validation has questions without an answer"):
        Span(answered, impossible).settings()


def test_a_decimal_comma_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;label\na;3,8\n")
    with pytest.raises(UserError, match="line 2: label '3,8' is not a finite number, written with a point"):
        Regression.read_examples(path)


@pytest.mark.parametrize("value", [True, 7, "x"])
def test_other_keys_do_no_harm(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "a", "label": value, "more": {"b": [1]}}) + "\n")
    assert read_labelled_texts(path).labels == [str(value)]


PRINTED = ["['drama', 'comedy']", "['drama' 'comedy']", "[]", "('a', 'b')", "{'a'}", "[0 1 1]"]


@pytest.mark.parametrize("field", PRINTED)
def test_printed_lists_are_no_names(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "a.csv", f'text,labels,tokens,tags\na,"{field}","{field}",x\n')
    with pytest.raises(UserError, match=r"line 2: labels is .*, a printed list; write names with ; between"):
        MultiLabel.read_examples(path)
    with pytest.raises(UserError, match=r"line 2: tokens is .*, a printed list; write words with spaces"):
        Token.read_examples(path)


def test_words_in_brackets_are_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,labels,tokens,tags\na,[sic];(x),[ a ],x y x\n")
    assert MultiLabel.read_examples(path).labels == [("[sic]", "(x)")]
    assert Token.read_examples(path)[0].words == ("[", "a", "]")


def test_ids_are_no_part_of_an_example(tmp_path: Path) -> None:
    rows = {
        Token: {"tokens": ["a", "b"], "tags": ["x", "y"]},
        MultipleChoice: {"text": "a", "choices": ["b", "c"], "label": 0},
        Span: {"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": [0]}},
    }
    for kind, row in rows.items():
        one, other = (
            write(tmp_path / f"{name}.jsonl", json.dumps({**row, "id": {"of": name}}) + "\n") for name in "ab"
        )
        with pytest.raises(UserError, match="all 1 .* are in .* too"):
            kind.read(one, other)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_halves_of_surrogate_pairs_are_refused(tmp_path: Path, name: str) -> None:
    rows = r'{"text": "whole \ud83d\ude00", "label": 1}', r'{"text": "ok \ud83d", "label": 0}'
    text = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]"
    with pytest.raises(UserError, match=r"(line|row) 2: holds half of a surrogate pair \('\\ud83d'\)"):
        read_labelled_texts(write(tmp_path / name, text))


def test_a_wrong_byte_is_counted_from_the_begin_of_the_file(tmp_path: Path) -> None:
    good = "text,label\n" + "é,1\n" * 5000
    for name, pack in (("a.csv", bytes), ("b.csv.gz", gzip.compress)):
        with pytest.raises(UserError, match=f"line 5002: not UTF-8 at byte {len(good.encode()) + 1};"):
            read_table(write(tmp_path / name, pack(good.encode() + b"a\xff,1\n")))


@pytest.mark.parametrize(("start", "found"), [("5.0", 5), (5.0, 5), ("4", 5), ("inf", None), (float("inf"), None)])
def test_first_characters_of_answers(start: Any, found: int | None) -> None:
    if found is None:
        with pytest.raises(UserError, match="must be a number of characters"):
            answers_of("a b, b c", "b", start)
    else:
        assert answers_of("a b, b c", "b", start)[0] == (("b", found),)


def test_a_column_has_one_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,x\na,b,1\n")
    for kind, layout in (
        (Classification, Layout(text_columns=["label"])),
        (Classification, Layout(text_columns=["text", "text"])),
        (Regression, Layout(text_columns=["text", "x"], label_columns=["x"])),
        (MultiLabel, Layout(label_columns=["x", "x"])),
        (MultipleChoice, Layout(choice_columns=["x", "text"])),
        (Span, Layout(text_columns=["text", "text"], label_columns=["label"])),
    ):
        with pytest.raises(UserError, match=r"a.csv: what is read of it .* has '\w+' 2 times"):
            kind.read_examples(path, layout)


def test_marks_in_lists_are_no_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "labels": [1, 0, 0]}\n')
    with pytest.raises(UserError, match=r"line 1: labels is \[1, 0, 0\], which has a name twice"):
        MultiLabel.read_examples(path)


def test_numbers_of_a_table_are_those_of_fp32(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [decimal.Decimal("1.50"), decimal.Decimal("-2")]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert Regression.read_examples(tmp_path / "a.parquet").labels == [1.5, -2.0]
    path = write(tmp_path / "a.json", '\n [{"text": "a", "label": 3e38}, {"text": "b", "label": 4e38}]')
    with pytest.raises(
        UserError, match=r"row 2: label 4e\+38 is not a finite number, written with a point, within FP32"
    ):
        Regression.read_examples(path)
