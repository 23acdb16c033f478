"""Output folders appear whole or not at all."""

from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.files import whole_folder


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a" / "out", ["*.txt"]) as folder:
        (folder / "x.txt").write_text("half")
        raise RuntimeError
    assert not list((tmp_path / "a").iterdir())


def test_a_failure_leaves_the_earlier_output(tmp_path: Path) -> None:
    for text, fails in (("first", False), ("second", True), ("third", False)):
        try:
            with whole_folder(tmp_path / "out", ["*.txt"]) as folder:
                (folder / "x.txt").write_text(text)
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert (tmp_path / "out" / "x.txt").read_text() == "first"
    assert (tmp_path / "out" / "x.txt").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 'y\.doc'"), whole_folder(tmp_path / "out", ["*.txt"]):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "y.doc").write_text("mine")
    assert (tmp_path / "out" / "y.doc").read_text() == "mine"
