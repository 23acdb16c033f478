"""The campaign's text: which paragraphs of a page are read, and that no document repeats a task or is in two parts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.kinds import of_name
from metro_megatron.text.documents import read_documents
from metro_megatron.text.inputs import find_inputs
from tools.campaign.documentation import is_prose, paragraphs, read_documentation
from tools.campaign.texts import HELD_OUT_CHARACTERS, split, task_ngrams, write

PAGE = """<!DOCTYPE html><html><head><title>A title that is left out</title><style>p { color: red }</style></head>
<body><nav><ul><li>Next</ul></nav><h1>Backups<a href="#x">&para;</a></h1>
<p>A <em>backup</em> is made
  with <code>pg_dump</code>&mdash;and read by&nbsp;it.<p>It has<b>no</b> end
<pre>code &lt;here&gt;</pre><ul><li>One item<li>Another &amp; last</ul>
<table><tr><td><pre>cell</pre></td></tr></table>After the table.<br>On a line.
<script>if (a < b) { document.write("<p>no</p>") }</script></div></body></html>"""


def test_paragraphs_stand_between_block_elements_and_code_and_tables_are_left_out():
    assert paragraphs(PAGE) == [
        "Backups¶",
        "A backup is made with pg_dump—and read by it.",
        "It hasno end",
        "One item",
        "Another & last",
        "After the table.",
        "On a line.",
    ]
    assert paragraphs("no element at all") == ["no element at all"]


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("This is a sentence of that kind which is to be kept.", True),
        ('He said: "The end of the day has come for us all."', True),
        ("This is a sentence of that kind which is to be kept", False),  # a heading
        ("The name of it is short.", False),
        ("Ceci est une phrase qui ne doit pas rester ici.", False),
        ("Arguments: x y z w v u t s r q p the end.", False),
    ],
)
def test_prose_is_sentences_of_english(text: str, is_kept: bool) -> None:
    assert is_prose(text) is is_kept


def test_a_paragraph_is_read_once_and_pages_come_in_the_order_of_paths(tmp_path: Path) -> None:
    licence = "Copying of this document is allowed to all that have read it."
    pages = {
        "b/two.html": ["This page has the words of the second of them all.", licence],
        "a/one.en.html": ["This page has the words of the first of them all."],
        "a/one.html.en": [licence, licence, "This page has a second paragraph that is of use."],
        "c/last.html": [licence],
        "c/last.fr.txt": ["This page has the words of a file that is no page."],
    }
    for name, lines in pages.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"<p>{line}</p>" for line in lines))
    (tmp_path / "a" / "link.html").symlink_to(tmp_path / "b" / "two.html")
    assert list(read_documentation(tmp_path)) == [
        "This page has the words of the first of them all.",
        f"{licence}\nThis page has a second paragraph that is of use.",
        "This page has the words of the second of them all.",
    ]
    with pytest.raises(UserError, match="holds no HTML page"):
        list(read_documentation(tmp_path / "c" / "none"))


def words(begin: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(begin, begin + count))


TASKS = [
    ProbeTask("one", of_name("classification"), [{"id": "1", "text": words(0, 20), "label": "a"}], [], {}),
    ProbeTask("two", of_name("spans"), [], [{"id": "2", "words": words(100, 9).split(), "tags": ["O"] * 9}], {}),
]


def test_documents_that_repeat_a_text_of_a_task_are_left_out():
    documents = {
        f"Before it {words(3, 13)} and after it": False,
        f"Before it {words(3, 12)} and after it": True,
        words(100, 9).upper(): False,
        words(100, 8): True,
    }
    others = [f"document {number} of {number}" for number in range(30)]
    found = split([*documents, *others, others[0]], task_ngrams(TASKS), held_out=0)
    assert found.train == [*(text for text, is_kept in documents.items() if is_kept), *others]
    assert found.overlaps == 2


def test_parts_have_no_document_in_common_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    documents = [f"Document {number}." + f"\nIt has a line of {number}." * 100 for number in range(40)]
    found = split(documents, task_ngrams(TASKS), held_out=5)
    assert [len(one) for one in found.parts().values()] == [30, 5, 5]
    held_out = [*found.validation, *found.test]
    assert all(HELD_OUT_CHARACTERS - 30 < len(one) <= HELD_OUT_CHARACTERS for one in held_out)
    wholes = [next(one for one in documents if one.startswith(held)) for held in held_out]
    assert sorted([*found.train, *wholes]) == sorted(documents)
    again = split(documents[::-1], task_ngrams(TASKS), held_out=5)
    assert all(set(again.parts()[part]) == set(texts) for part, texts in found.parts().items())

    write(tmp_path, {"reviews": found, "documentation": again})
    for part, texts in found.parts().items():
        read = read_documents(find_inputs([str(tmp_path / f"{part}.jsonl")]), rejects := Counter())
        assert ["\n".join(one.units) for one in read] == [*texts, *again.parts()[part]] and not rejects
    assert json.loads((tmp_path / "counts.json").read_text())["reviews"]["train"] == 30
    with pytest.raises(UserError, match="40 different documents are left, must be more than the 40"):
        split(documents, task_ngrams(TASKS), held_out=20)
