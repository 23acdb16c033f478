"""Words of manuals and what their fonts say."""

import gzip
from pathlib import Path

import pytest

from metro_megatron.tasks.manuals import parse_sections, read_manual


@pytest.mark.parametrize(
    ("source", "words", "tags"),
    [
        ("plain text", "plain text", "OO"),
        (r"give \fB\-l\fP or \fB\-\-long\fR, please", "give -l or --long, please", "OoOoO"),
        (".B ls\n.BR open (2),\n(\n.I file )", "ls open(2), ( file )", "ccOOO"),
        (".IR /etc/passwd ,\n.B /bin/sh\n.I name", "/etc/passwd, /bin/sh name", "ffO"),
        ('.RB ( read "(2), " write "(2), "', "(read(2), write(2),", "cc"),
        ('.BI \\-n " count"', "-n count", "oO"),
        (r"say \(lqhi\(rq \(em it\(aqs \fIx\fP\e y\|z \*(lqq", 'say "hi" - it\'s x\\ yz q', "OOOOOOO"),
        ("before\n.nf\nverbatim\n.fi\n.EX\ncode\n.EE\nafter", "before after", "OO"),
        ('.\\" comment\n.\n.unknown thing\nrest \\" of it', "rest", "O"),
    ],
)
def test_words_and_tags(source: str, words: str, tags: str) -> None:
    names = {"O": "O", "o": "option", "c": "code", "f": "file"}
    (section,) = parse_sections(f'.SH "ONE TITLE"\n{source}\n')
    (found,) = section.paragraphs
    assert section.title == "ONE TITLE" and [word.text for word in found] == words.split()
    assert [word.tag for word in found] == [names[tag] for tag in tags]


def test_paragraphs_sections_and_text_before_the_first() -> None:
    sections = parse_sections(
        "lost\n.SH A\none\n.PP\ntwo\\\n half\n.TP\n.B three\nfour\n.SS Sub\nfive\n.SH B\n.IP (1) 4\nsix"
    )
    shown = [(one.title, [" ".join(word.text for word in words) for words in one.paragraphs]) for one in sections]
    assert shown == [("A", ["one", "two half", "three four", "five"]), ("B", ["(1) six"])]


def test_files_that_are_no_manuals(tmp_path: Path) -> None:
    path = tmp_path / "x.1.gz"
    for content in (b"", b"not compressed", gzip.compress(b".so man1/y.1")[:-3], gzip.compress(b".so man1/y.1")):
        path.write_bytes(content)
        assert read_manual(path) is None
    path.write_bytes(gzip.compress(b".SH NAME\na, b \\- do it\n.SH USE\n\xff text"))
    manual = read_manual(path)
    assert manual and (manual.names, manual.summary, manual.sections[0].title) == (("a", "b"), "do it", "USE")
