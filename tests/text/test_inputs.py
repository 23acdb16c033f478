"""Inputs are found in one order, and everything wrong with them is named at once."""

import os
from pathlib import Path

import pytest

from metro_megatron.errors import UserError
from metro_megatron.text.inputs import find_inputs, plan_chunks


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.jsonl", "b/10.txt.gz", "a.jsonl", "b/c/x.bz2", "b/notes.md", "b/.hidden.jsonl", "b/c/y.json.zst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((b"x" if name.endswith("l") else b"\0") * 10)
    return tmp_path


def found(tree: Path, *patterns: str) -> list[tuple[str, str]]:
    return [(file.source, os.path.relpath(file.path, tree)) for file in find_inputs(patterns)]


def test_files_folders_globs_and_sources(tree: Path) -> None:
    assert found(tree, f"{tree}/a.jsonl", f"{tree}/b") == [
        ("", "a.jsonl"),
        ("", "b/10.txt.gz"),
        ("", "b/2.jsonl"),
        ("", "b/c/y.json.zst"),
    ]
    assert found(tree, f"wiki={tree}/*.jsonl", f"cc-news={tree}/**/*.zst") == [
        ("wiki", "a.jsonl"),
        ("cc-news", "b/c/y.json.zst"),
    ]
    (tree / "k=v.jsonl").write_bytes(b"")
    assert found(tree, f"{tree}/k=v.jsonl") == [("", "k=v.jsonl")]


def test_what_this_program_has_written_is_left_out_and_said(tree: Path) -> None:
    """Of a folder and of globs, with what is unknown; a file that is named is read whatever it is."""
    own = ["s.manifest.json", "s.tokenizer/tokenizer.json", "s.tokenizer/tokenizer_config.json", "t.work/plan.json"]
    own += ["t.work/lock", "t.work/chunk-000000.json", "run/run_config.yaml", "run/metrics.jsonl", "x/index.json"]
    own += ["x/start.bin", "b/tokenizer_config.json", "b/report.json"]
    for name in (*own, "b/plan.json", "b/index.json"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"{}")
    lines: list[str] = []
    files = [os.path.relpath(file.path, tree) for file in find_inputs([str(tree)], lines.append)]
    assert files == ["a.jsonl", "b/10.txt.gz", "b/2.jsonl", "b/c/y.json.zst", "b/index.json", "b/plan.json"]
    assert lines == [
        "left out of folders and globs: 12 of this program's own, 1 hidden, 1 .bz2, 1 .md; a file that is named is read"
    ]
    assert found(tree, f"{tree}/*.json*", f"{tree}/b/*n.json") == [
        ("", "a.jsonl"),
        ("", "b/plan.json"),
    ]
    assert found(tree, f"{tree}/s.manifest.json") == [("", "s.manifest.json")]


def test_globs_read_what_the_shell_would_name(tree: Path) -> None:
    """Folders, of which nothing is lost; what a program has left inside them is no text."""
    for name in ("b/run/run_config.yaml", "b/run/checkpoints/step.json", "bert/config.json", "bert/vocab.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"{}")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "c/own.json"):
        (tree / "b" / name).write_bytes(b"{}")
    texts = [("", name) for name in ("b/10.txt.gz", "b/2.jsonl", "b/c/own.json", "b/c/y.json.zst")]
    assert found(tree, f"{tree}/[b]*") == found(tree, f"{tree}/b") == texts
    assert found(tree, f"{tree}/**/*.json") == [("", "b/c/own.json")]
    assert found(tree, f"{tree}/b/run/checkpoints/*.json") == [("", "b/run/checkpoints/step.json")]
    (tree / "b" / "gone.txt").symlink_to("nowhere")
    os.link(tree / "a.jsonl", tree / "b" / "hard.jsonl")
    with pytest.raises(UserError) as refused:
        find_inputs([f"{tree}/b/*.txt", f"{tree}/a.jsonl", f"{tree}/b/*.jsonl"])
    assert refused.value.problems == [
        f"{tree}/b/gone.txt: cannot be read (No such file or directory)",
        f"{tree}/a.jsonl: given 2 times, as {tree}/b/hard.jsonl; name it once",
    ]


def test_equals_signs_and_brackets_in_names(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "x[1]").mkdir()
    for name in ("lang=en1.txt", "lang=en2.txt", "x[1]/a.txt", "en3.txt"):
        (tree / name).touch()
    monkeypatch.chdir(tree)
    assert [(one.source, one.path) for one in find_inputs(["lang=en*.txt", "own=x[1]/*.txt", "own=en*.txt"])] == [
        ("", "lang=en1.txt"),
        ("", "lang=en2.txt"),
        ("own", "x[1]/a.txt"),
        ("own", "en3.txt"),
    ]
    assert [one.path for one in find_inputs(["[a]*.jsonl"])] == ["a.jsonl"]


def test_all_problems_at_once(tree: Path) -> None:
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "broken.jsonl").symlink_to(tree / "nowhere.jsonl")
    patterns = [
        f"{tree}/missing.jsonl",
        f"{tree}/b/notes.md",
        f"{tree}/b",
        f"{tree}/*.parquet",
        f"../up={tree}/a.jsonl",
    ]
    patterns += [
        f"{tree}/a.jsonl",
        f"{tree}/../{tree.name}/a.jsonl",
        f"{tree}/broken.jsonl",
        f"bad name={tree}/a.jsonl",
    ]
    with pytest.raises(UserError) as refused:
        find_inputs(patterns)
    text = "\n".join(refused.value.problems)
    for part in (
        "missing.jsonl: no such file",
        "notes.md: unknown kind of file",
        "leads back to a folder above it",
        "*.parquet: no such file",
        "../up=",
        "a.jsonl: given 2 times",
        "broken.jsonl: cannot be read",
        "'bad name'",
    ):
        assert part in text, part
    with pytest.raises(UserError, match="no input"):
        find_inputs([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tree: Path) -> None:
    (tree / "a.jsonl").chmod(0)
    (tree / "b").chmod(0)
    with pytest.raises(UserError, match="cannot be read") as refused:
        find_inputs([f"{tree}/a.jsonl", f"{tree}/b"])
    assert "cannot be listed" in refused.value.problems[1]


def test_chunks_cover_plain_files_and_leave_compressed_ones_whole(tree: Path) -> None:
    chunks = plan_chunks(find_inputs([f"{tree}/b", f"{tree}/a.jsonl"]), 4)
    spans = [(os.path.relpath(chunk.file.path, tree), chunk.begin, chunk.end) for chunk in chunks]
    assert spans == [
        ("b/10.txt.gz", 0, 10),
        ("b/2.jsonl", 0, 4),
        ("b/2.jsonl", 4, 8),
        ("b/2.jsonl", 8, 10),
        ("b/c/y.json.zst", 0, 10),
        ("a.jsonl", 0, 4),
        ("a.jsonl", 4, 8),
        ("a.jsonl", 8, 10),
    ]
    assert [chunk.number for chunk in chunks] == list(range(8))
