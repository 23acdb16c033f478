"""Files of dictionaries, whole and damaged, and what their articles say."""

import gzip
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.tasks.dictd import Entry, decode_number, read_dictionary
from metro_megatron.tasks.entries import Sense, Subject, foldoc_subject, gcide_sense, sentences, wordnet_senses
from tests.tasks.conftest import base64, write_dictionary


def test_numbers_are_base_64_with_the_most_significant_digit_first() -> None:
    assert [decode_number(digits) for digits in ("A", "BA", "FPMv", "/")] == [0, 64, 1_372_975, 63]
    assert all(decode_number(base64(number)) == number for number in (0, 63, 64, 4095, 4096, 10**9))


def test_articles_are_read_once_and_what_is_unreadable_is_counted(tmp_path: Path) -> None:
    more = b"\n".join(
        [
            b"alias\tA\tG",  # the first article again
            b"bad digits\t?\tB",
            b"no numbers",
            b"no length\tB\t",
            b"beyond\tZZZZ\tB",
            b"caf\xe9\tA\tB",
            b"half a letter\tH\tB",
            b"empty\tF\tA",
            b"00-database-info\tA\tF",
            b"",
        ]
    )
    write_dictionary(tmp_path / "x", {"first": "first\n", "accent": "é\n", "blank": " \n"}, more)
    found = read_dictionary(tmp_path / "x")
    assert found.entries == [Entry("first", "first\n"), Entry("accent", "é\n")]
    assert found.rejects == {
        "another headword of the same article": 1,
        "unreadable line of the index": 4,
        "outside the text": 1,
        "not UTF-8": 1,
        "empty": 2,
    }


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_a_damaged_text_is_refused_with_a_remedy(tmp_path: Path, damage: str) -> None:
    write_dictionary(tmp_path / "wn", {word: word * 200 for word in ("one", "two")})
    packed = tmp_path / "wn.dict.dz"
    content = bytearray(packed.read_bytes())
    content[-6] ^= 1
    packed.write_bytes({"truncated": content[:-9], "garbage": b"plain text", "flipped": bytes(content)}[damage])
    with pytest.raises(UserError, match=r"wn.dict.dz: damaged .* download the package dict-wn again"):
        read_dictionary(tmp_path / "wn")
    packed.unlink()
    with pytest.raises(UserError, match="no such file; install or download the package dict-wn"):
        read_dictionary(tmp_path / "wn")


def test_a_text_that_is_no_gzip_member_at_all(tmp_path: Path) -> None:
    write_dictionary(tmp_path / "wn", {"one": "one"})
    (tmp_path / "wn.dict.dz").write_bytes(gzip.compress(b"")[:5])
    with pytest.raises(UserError, match="damaged"):
        read_dictionary(tmp_path / "wn")


RUN = """run
    n 1: a score in baseball; "the Yankees scored 3 runs: a lot" [syn:
         {run}, {tally}]
    2: the act (or so) of testing
       something
    v 1: move fast
"""
ABACK = """Aback \\A*back"\\ ([.a]*b[a^]k"), adv. [Pref. a- + back; AS. on
   b[ae]c at. See {Back}.]
   1. (Naut.) Toward the back or {rear}; backward. "Therewith aback she
      started." --Chaucer.
      [1913 Webster]

   2. Behind.
"""
MACHINE = """abstract machine

   1. <language, theory> A {processor} design which is
   not intended.

   A {virtual machine} is.
"""


def test_what_articles_say() -> None:
    first, second, third = wordnet_senses(Entry("run", RUN))
    assert first == Sense("noun", "a score in baseball", ("the Yankees scored 3 runs: a lot",))
    assert second == Sense("noun", "the act of testing something") and third == Sense("verb", "move fast")
    expected = 'Toward the back or rear; backward. "Therewith aback she started."'
    assert gcide_sense(Entry("Aback", ABACK)) == Sense("adverb", expected)
    found = foldoc_subject(Entry("abstract machine", MACHINE))
    assert found == Subject("language", "A processor design which is not intended.")
    for text in ("", "x", "x\n", "\\\\", "\\x", "n 1: "):
        assert wordnet_senses(Entry("x", text)) == [] and gcide_sense(Entry("x", text)) is None
        assert foldoc_subject(Entry("x", text)) is None
    found = list(sentences("One two. No. Version 3.5 is  out! a b? not ended", range(2, 5)))
    assert found == ["One two.", "Version 3.5 is out!", "a b?"]
