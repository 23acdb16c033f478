"""From drafts to a folder of tasks: without duplicates and overlaps, sides by hashes, with baselines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.files import whole_folder
from metro_megatron.preprocess.decontamination import SHORTEST_TEXT, EvaluationNgrams
from metro_megatron.probing.folder import FORMAT, MANIFEST, SIDES, ProbeTask, encode_rows
from metro_megatron.probing.kinds import Row, all_texts, of_name
from metro_megatron.tasks.baselines import tfidf
from metro_megatron.tasks.hashing import is_test, shuffled, text_hash
from metro_megatron.tasks.recipes import RECIPES, Draft, Recipe
from metro_megatron.tasks.sources import Sources
from metro_megatron.text.documents import read_documents
from metro_megatron.text.inputs import find_inputs
from metro_megatron.text.records import Reject

_BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """Most rows of each side."""

    train: int
    test: int

    def of(self, recipe: Recipe, side: str) -> int:
        return max(1, (self.train if side == "train" else self.test) // recipe.texts_per_row)


@dataclass
class Drafted:
    """The drafts of a task that are left, and why others went."""

    recipe: Recipe
    drafts: list[Draft]
    dropped: Counter[str]


def make_tasks(
    sources: Sources,
    output: Path,
    recipes: Sequence[Recipe],
    sizes: Sizes,
    pretraining: Sequence[str],
    versions: dict[str, str],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Write the tasks' folder, and return its manifest.

    pretraining: files of the text that encoders were pretrained on; rows that overlap with it, by
    preprocess/decontamination.py, are left out, and so is all of their headword or document in the task. Equal sources
    give equal folders. Raises UserError for sources that are missing or too small, and a foreign output folder.
    """
    drafted = []
    problems: list[str] = []
    for recipe in recipes:
        try:
            drafted.append(_draft(recipe, sources))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    compared = _drop_overlaps(drafted, pretraining, say) if pretraining else 0
    with whole_folder(output, (MANIFEST, *(recipe.name for recipe in RECIPES))) as folder:
        facts = {}
        for one in drafted:
            task = _task(one, sizes)
            facts[one.recipe.name] = _write(task, folder, one)
            if pretraining:
                facts[one.recipe.name]["too_short_to_compare"] = _too_short(one.drafts)
            say(_describe(task, one))
        manifest = {
            "format_version": FORMAT,
            "tasks": facts,
            "sources": dict(sorted(sources.hashes.items())),
            "packages": versions,
            "rejects": {name: dict(sorted(counts.items())) for name, counts in sorted(sources.rejects.items())},
            "pretraining": {"files": [Path(name).name for name in pretraining], "documents": compared},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _draft(recipe: Recipe, sources: Sources) -> Drafted:
    """Every row once: of rows with one text (a definition of several headwords) the first by hash."""
    dropped: Counter[str] = Counter()
    drafts, seen = [], set()
    for draft in shuffled(recipe.drafts(sources), lambda draft: draft.group, recipe.name):
        text = next(all_texts(draft.row)).lower()
        if text in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(text)
        drafts.append(draft)
    return Drafted(recipe, drafts, dropped)


def _drop_overlaps(drafted: Sequence[Drafted], pretraining: Sequence[str], say: Callable[[str], object]) -> int:
    """Drop from every task the groups that the documents of these files repeat; returns how many documents."""
    groups = sorted({(one.recipe.name, draft.group) for one in drafted for draft in one.drafts})
    number = {group: place for place, group in enumerate(groups)}
    texts = (
        (number[one.recipe.name, draft.group], text)
        for one in drafted
        for draft in one.drafts
        for text in draft.sources or all_texts(draft.row)
    )
    ngrams = EvaluationNgrams.from_texts(texts, len(groups))
    is_repeated, compared = ngrams.repeated([]), 0
    for block in _blocks(pretraining):
        is_repeated |= ngrams.repeated(block)
        compared += len(block)
        say(f"{compared:,} documents of the pretraining text compared, {int(is_repeated.sum()):,} overlaps")
    for one in drafted:
        kept = [draft for draft in one.drafts if not is_repeated[number[one.recipe.name, draft.group]]]
        one.dropped["overlap with the pretraining text"] += len(one.drafts) - len(kept)
        one.drafts = kept
    return compared


def _blocks(patterns: Sequence[str]) -> Iterator[list[str]]:
    """Texts of documents, about a megabyte at a time."""
    rejects: Counter[Reject] = Counter()
    block: list[str] = []
    size = 0
    for document in read_documents(find_inputs(patterns), rejects):
        block.append("\n".join(document.units))
        size += len(block[-1])
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _too_short(drafts: Sequence[Draft]) -> int:
    return sum(
        all(len(text.split()) < SHORTEST_TEXT for text in draft.sources or all_texts(draft.row)) for draft in drafts
    )


def _task(drafted: Drafted, sizes: Sizes) -> ProbeTask:
    """Rows of both sides, labels as equal in number as they can be. Raises UserError for a side without any."""
    recipe = drafted.recipe
    sides: dict[str, list[Row]] = {}
    for side in SIDES:
        own = [draft for draft in drafted.drafts if is_test(draft.group) == (side == "test")]
        rank: Counter[str] = Counter()
        ranked = []
        for draft in own:
            label = draft.row.get("label", "")
            ranked.append((rank[label], draft))
            rank[label] += 1
        taken = sorted(ranked, key=lambda one: one[0])[: sizes.of(recipe, side)]
        rows = [draft.row for _, draft in sorted(taken, key=lambda one: text_hash(recipe.name, one[1].group))]
        if not rows or ("label" in rows[0] and len(rank) < 2):
            raise UserError(
                f"{recipe.name}: the sources leave {len(rows)} rows with {len(rank)} labels for {side}; "
                "give more text, or leave the task out with --tasks"
            )
        sides[side] = [{"id": _identity(recipe, row), **row} for row in rows]
    return ProbeTask(recipe.name, of_name(recipe.kind), sides["train"], sides["test"], {})


def _identity(recipe: Recipe, row: Row) -> str:
    return f"{recipe.name}-{text_hash(json.dumps(row, sort_keys=True)):016x}"


def _write(task: ProbeTask, folder: Path, drafted: Drafted) -> dict[str, Any]:
    """Write both sides of a task, and return what the manifest says of it."""
    recipe = drafted.recipe
    (folder / task.name).mkdir()
    contents = {side: encode_rows(rows) for side, rows in zip(SIDES, (task.train, task.test), strict=True)}
    for side, content in contents.items():
        (folder / task.name / f"{side}.jsonl").write_bytes(content)
    task.baselines["trivial"] = task.kind.trivial(task.train, task.test)
    task.baselines["tfidf"] = tfidf(task)
    return {
        "kind": recipe.kind,
        "metric": task.kind.metric,
        "about": recipe.about,
        "sources": list(recipe.packages),
        "rows": {"train": len(task.train), "test": len(task.test)},
        "labels": dict(sorted(Counter(row["label"] for row in task.test if "label" in row).items())),
        "drafts": len(drafted.drafts),
        "dropped": dict(sorted(drafted.dropped.items())),
        "baselines": task.baselines,
        "sha256": {side: hashlib.sha256(content).hexdigest() for side, content in contents.items()},
    }


def _describe(task: ProbeTask, drafted: Drafted) -> str:
    dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in sorted(drafted.dropped.items()) if count)
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in task.baselines.items())
    return f"{task.name}: {len(task.train):,} and {len(task.test):,} rows{dropped}; {task.kind.metric}: {baselines}"
