"""The kinds of probing tasks: what of a row is read, and how features of it become scores.

Every row has an `id` of its own. A text is read as pieces, each of which gets one feature: a whole text, or its words.
Legend: n rows, P pieces of all their texts in order, d features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError

Row: TypeAlias = Mapping[str, Any]
Features: TypeAlias = NDArray[np.floating]
"""[P, d]"""
Classify: TypeAlias = Callable[[Features, NDArray[np.int64], Features, int], NDArray[np.float64]]
"""A linear classifier, called as probing.ridge.ridge_scores is."""

GAP = "___"
"""Stands for the word that is asked for."""
RANKS = 10
"""Ranks that count in nDCG@10."""
OUTSIDE = "O"
"""Tag of a word that is in no span."""


@dataclass(frozen=True)
class Scores:
    """How good the answers for some rows are."""

    figures: dict[str, float]
    items: list[float]
    """Of every row, in [0, 1]; their mean is a figure, too."""


class Kind(ABC):
    """What the tasks of one kind have in common."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """The figure by which encoders are compared."""
    columns: ClassVar[dict[str, type]]
    """What a row must have beside its id."""
    learns: ClassVar[bool] = True
    """Whether a classifier is trained."""

    def problem(self, row: Row) -> str | None:
        """What is wrong with a row."""
        for column, kind in self.columns.items():
            if not isinstance(row.get(column), kind) or row[column] in ("", []):
                return f"{column} is {row.get(column)!r}, must be a {kind.__name__} that is not empty"
        return None

    @abstractmethod
    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        """All that is read, each text as its pieces."""

    @abstractmethod
    def scores(
        self, train: Sequence[Row], of_train: Features, test: Sequence[Row], of_test: Features, classify: Classify
    ) -> Scores:
        """How well the test rows are answered; a kind that does not learn looks at neither train nor of_train."""

    @abstractmethod
    def trivial(self, train: Sequence[Row], test: Sequence[Row]) -> float:
        """What `metric` is without reading: for the most frequent answer, or by chance where none is more frequent."""


class Classification(Kind):
    """Each text has one label."""

    name, metric = "classification", "mcc"
    columns: ClassVar[dict[str, type]] = {"text": str, "label": str}

    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        return [[row["text"]] for row in rows]

    def features(self, found: Features) -> Features:
        """[n, d] of the pieces' features."""
        return found

    def scores(
        self, train: Sequence[Row], of_train: Features, test: Sequence[Row], of_test: Features, classify: Classify
    ) -> Scores:
        names = sorted({row["label"] for row in train})
        known = np.array([names.index(row["label"]) for row in train])
        found = classify(self.features(of_train), known, self.features(of_test), len(names)).argmax(1)
        guessed = [names[one] for one in found]
        labels = [row["label"] for row in test]
        items = [float(one == label) for one, label in zip(guessed, labels, strict=True)]
        return Scores({"mcc": matthews(labels, guessed), "accuracy": float(np.mean(items))}, items)

    def trivial(self, train: Sequence[Row], test: Sequence[Row]) -> float:
        return 0.0


class Pairs(Classification):
    """Each pair of texts has one label; of features u and v the classifier reads |u - v| and u v (Conneau 2017)."""

    name = "pairs"
    columns: ClassVar[dict[str, type]] = {"text_a": str, "text_b": str, "label": str}

    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        return [[text] for row in rows for text in (row["text_a"], row["text_b"])]

    def features(self, found: Features) -> Features:
        first, second = found[::2], found[1::2]
        return np.concatenate([np.abs(first - second), first * second], axis=1)


class Retrieval(Kind):
    """Each text_a is asked; all different text_b of the side are candidates, by cosine of mean-centred features."""

    name, metric, learns = "retrieval", "ndcg10", False
    columns: ClassVar[dict[str, type]] = {"text_a": str, "text_b": str}

    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        return [[row["text_a"]] for row in rows] + [[text] for text in _candidates(rows)]

    def scores(
        self, train: Sequence[Row], of_train: Features, test: Sequence[Row], of_test: Features, classify: Classify
    ) -> Scores:
        asked, offered = (_centred(part) for part in (of_test[: len(test)], of_test[len(test) :]))
        likeness = asked @ offered.T
        number = {text: place for place, text in enumerate(_candidates(test))}
        right = np.array([number[row["text_b"]] for row in test])
        own = np.take_along_axis(likeness, right[:, None], 1)
        # Candidates that are as near count as nearer: equal features earn nothing.
        rank = (likeness >= own).sum(1)
        items = np.where(rank <= RANKS, 1.0 / np.log2(1.0 + rank), 0.0)
        return Scores({"ndcg10": float(items.mean()), "accuracy": float((rank == 1).mean())}, items.tolist())

    def trivial(self, train: Sequence[Row], test: Sequence[Row]) -> float:
        count = len(_candidates(test))
        return float(sum(1.0 / np.log2(1.0 + rank) for rank in range(1, min(RANKS, count) + 1)) / count)


class Choice(Kind):
    """Which of the choices stands at GAP: the one whose filled text the classifier finds rightest."""

    name, metric = "choice", "accuracy"
    columns: ClassVar[dict[str, type]] = {"text": str, "choices": list, "answer": int}

    def problem(self, row: Row) -> str | None:
        found = super().problem(row)
        if not found and GAP not in row["text"]:
            found = f"text has no {GAP}"
        if not found and not 0 <= row["answer"] < len(row["choices"]):
            found = f"answer is {row['answer']}, must be the number of one of {len(row['choices'])} choices, from 0"
        return found

    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        return [[row["text"].replace(GAP, choice)] for row in rows for choice in row["choices"]]

    def scores(
        self, train: Sequence[Row], of_train: Features, test: Sequence[Row], of_test: Features, classify: Classify
    ) -> Scores:
        known = np.array([int(number == row["answer"]) for row in train for number in range(len(row["choices"]))])
        rightness = classify(of_train, known, of_test, 2)[:, 1]
        ends = np.cumsum([len(row["choices"]) for row in test])[:-1]
        guessed = [int(part.argmax()) for part in np.split(rightness, ends)]
        items = [float(one == row["answer"]) for one, row in zip(guessed, test, strict=True)]
        return Scores({"accuracy": float(np.mean(items))}, items)

    def trivial(self, train: Sequence[Row], test: Sequence[Row]) -> float:
        return float(np.mean([1.0 / len(row["choices"]) for row in test]))


class Spans(Kind):
    """Each word has a tag; a span is as many words as follow one another with one tag but OUTSIDE."""

    name, metric = "spans", "span_f1"
    columns: ClassVar[dict[str, type]] = {"words": list, "tags": list}

    def problem(self, row: Row) -> str | None:
        found = super().problem(row)
        if not found and len(row["words"]) != len(row["tags"]):
            found = f"has {len(row['words'])} words and {len(row['tags'])} tags"
        return found

    def texts(self, rows: Sequence[Row]) -> list[list[str]]:
        return [list(row["words"]) for row in rows]

    def scores(
        self, train: Sequence[Row], of_train: Features, test: Sequence[Row], of_test: Features, classify: Classify
    ) -> Scores:
        names = sorted({tag for row in train for tag in row["tags"]})
        known = np.array([names.index(tag) for row in train for tag in row["tags"]])
        found = classify(of_train, known, of_test, len(names)).argmax(1)
        ends = np.cumsum([len(row["tags"]) for row in test])[:-1]
        guessed = [[names[one] for one in part] for part in np.split(found, ends)]
        return span_scores([list(row["tags"]) for row in test], guessed)

    def trivial(self, train: Sequence[Row], test: Sequence[Row]) -> float:
        most, _ = Counter(tag for row in train for tag in row["tags"]).most_common(1)[0]
        tags = [list(row["tags"]) for row in test]
        return span_scores(tags, [[most] * len(one) for one in tags]).figures["span_f1"]


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), Pairs(), Retrieval(), Choice(), Spans())}


def of_name(name: Any) -> Kind:
    """The kind of that name. Raises UserError."""
    if name not in KINDS:
        raise UserError(f"kind is {name!r}, must be one of {', '.join(KINDS)}")
    return KINDS[name]


def matthews(labels: Sequence[str], guessed: Sequence[str]) -> float:
    """Matthews correlation over all classes (Gorodkin 2004); 0 where either side has one class only."""
    names = sorted({*labels, *guessed})
    counts = np.zeros((len(names), len(names)))
    for label, guess in zip(labels, guessed, strict=True):
        counts[names.index(label), names.index(guess)] += 1
    true, found, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = np.sqrt((total**2 - true @ true) * (total**2 - found @ found))
    return float((counts.trace() * total - true @ found) / spread) if spread else 0.0


def spans_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, end, tag) of every span."""
    found, begin = set(), 0
    for tag, run in groupby(tags):
        end = begin + len(list(run))
        if tag != OUTSIDE:
            found.add((begin, end, tag))
        begin = end
    return found


def span_scores(tags: Sequence[Sequence[str]], guessed: Sequence[Sequence[str]]) -> Scores:
    """F1 over exact spans of all texts, share of right words, and F1 of every text (1 where neither has a span)."""
    pairs = [(spans_of(true), spans_of(guess)) for true, guess in zip(tags, guessed, strict=True)]
    right, both = (sum(sizes) for sizes in zip(*map(_right_and_both, pairs), strict=True))
    words = [a == b for true, guess in zip(tags, guessed, strict=True) for a, b in zip(true, guess, strict=True)]
    items = [2 * hits / sizes if sizes else 1.0 for hits, sizes in map(_right_and_both, pairs)]
    return Scores({"span_f1": 2 * right / both if both else 1.0, "accuracy": float(np.mean(words))}, items)


def _right_and_both(pair: tuple[set[Any], set[Any]]) -> tuple[int, int]:
    return len(pair[0] & pair[1]), len(pair[0]) + len(pair[1])


def _candidates(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["text_b"] for row in rows))


def _centred(features: Features) -> NDArray[np.float64]:
    """Of length 1 and mean 0 before that; zero stays zero."""
    centred = features - features.mean(0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(norms == 0, 1.0, norms)


def all_texts(row: Row) -> Iterator[str]:
    """Every text in a row as it would stand in a document."""
    if "choices" in row:
        yield row["text"].replace(GAP, row["choices"][row["answer"]])
        return
    if "words" in row:
        yield " ".join(row["words"])
    yield from (row[column] for column in ("text", "text_a", "text_b") if column in row)
