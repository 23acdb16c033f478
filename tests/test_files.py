"""Files and folders appear whole or not at all; a lock is held by one."""

import multiprocessing
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.files import (
    first_folder,
    json_lines,
    locked,
    move_whole,
    remove_partial,
    replace_text,
    whole_files,
    whole_folder,
    write_whole,
)


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


def test_a_folder_of_others_with_the_same_names_is_kept(tmp_path: Path) -> None:
    """A model of somebody else has config.json and weights, too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("theirs")
    with pytest.raises(UserError, match="has no mark.txt"), whole_folder(tmp_path / "out", ["*.txt"], "mark.txt"):
        pass
    assert (tmp_path / "out" / "a.txt").read_text() == "theirs"
    (tmp_path / "out" / "mark.txt").touch()
    with whole_folder(tmp_path / "out", ["*.txt"], "mark.txt") as folder:
        (folder / "b.txt").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.txt"]


def test_several_files_get_their_names_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("old")
    with pytest.raises(RuntimeError), whole_files(paths) as files:
        files[0].write(b"new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and paths[0].read_text() == "old"
    with whole_files(paths) as files, whole_files(paths) as others:
        for file in files + others:
            file.write(b"new")
        assert paths[0].read_text() == "old"
    assert sorted(tmp_path.iterdir()) == paths and {path.read_text() for path in paths} == {"new"}
    replace_text(paths[0], "é")
    assert paths[0].read_bytes() == "é".encode()


def test_a_file_that_has_its_name_is_whole_whatever_the_storage_says_of_the_other_name(tmp_path: Path) -> None:
    def broken(path: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", broken)
        write_whole(tmp_path / "a", b"content")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"content")]


def test_a_place_that_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, whole_files([tmp_path / "no" / "a"]):
        pass
    assert raised.value.filename == str(tmp_path / "no" / "a")


def test_of_lines_those_are_read_that_are_whole_and_have_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert json_lines(path) == []
    damaged = b'\n3\nnull\n[{}\n\xff}\n{"b": 5}\n' + b"[" * 10**5
    path.write_bytes(b'{"a": 1, "b": 2}\n' + damaged + b'\n{"a": null}\n{"a": 7, "')
    assert json_lines(path, "a") == [{"a": 1, "b": 2}, {"a": None}]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    replace_text(tmp_path / "kept", "x")
    (tmp_path / "lost.0123456789ab.partial").write_text("half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_first_folder_stays_and_a_moved_one_replaces(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with first_folder(target) as slow, first_folder(target) as fast:
        (slow / "x").write_text("slow")
        (fast / "x").write_text("fast")
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (target / "x").read_text() == "fast"
    finished = tmp_path / "finished"
    finished.mkdir()
    move_whole(finished, target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and not list(target.iterdir())


def _is_free(path: Path) -> bool:
    try:
        with locked(path, wait=False):
            return True
    except BlockingIOError:
        return False


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with locked(tmp_path / "lock", wait=False):
            assert not pool.apply(_is_free, (tmp_path / "lock",))
        assert pool.apply(_is_free, (tmp_path / "lock",))
