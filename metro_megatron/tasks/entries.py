"""What the articles of three dictionaries say, without how they print it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from metro_megatron.tasks.dictd import Entry

_WORDNET_SENSE = re.compile(r"^    (?:(n|v|adj|adv) )?\d+: ", re.MULTILINE)
_NOTES = re.compile(r"\[(?:syn|ant|also): .*?\]|\([^()]*\)")
_EXAMPLE = re.compile(r'"([^"]+)"')
_GCIDE_HEAD = re.compile(r"\A[^\n]*?\\[^\\]*\\,?(.*?)(?:\n(?=   \S)|\Z)", re.DOTALL)
_GCIDE_PARTS = (("n.", "noun"), ("v.", "verb"), ("a.", "adjective"), ("adv.", "adverb"))
_GCIDE_END = re.compile(r"\n\s*\n|\[1913 Webster\]|\[PJC\]|\[WordNet|--")
_GCIDE_NOISE = re.compile(r"\[[^\]]*\]|\([A-Z][^()]*\.\)|^\s*\d+\.\s|[{}]")
_FOLDOC_DOMAIN = re.compile(r"\A\s*(?:1\. )?<([^<>]+)>\s*(.*)\Z", re.DOTALL)
_SENTENCE = re.compile(r"[^.!?]+[.!?](?=\s|$)")
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}


@dataclass(frozen=True)
class Sense:
    """One meaning of a headword."""

    part_of_speech: str
    """noun, verb, adjective, adverb."""
    definition: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """An article of an encyclopedic dictionary."""

    domain: str
    text: str


def wordnet_senses(entry: Entry) -> list[Sense]:
    """All senses of an article of WordNet (dict-wn)."""
    parts = _WORDNET_SENSE.split(entry.text)
    senses, part = [], ""
    for abbreviation, body in zip(parts[1::2], parts[2::2], strict=True):
        part = PARTS_OF_SPEECH[abbreviation] if abbreviation else part
        text = _NOTES.sub("", one_line(body))
        definition = one_line(text.split('"')[0]).strip(" ;:")
        if part and definition:
            senses.append(Sense(part, definition, tuple(map(one_line, _EXAMPLE.findall(text)))))
    return senses


def gcide_sense(entry: Entry) -> Sense | None:
    """The first sense of an article of GCIDE, of which a part of speech is known."""
    head = _GCIDE_HEAD.match(entry.text)
    if head is None:
        return None
    # Etymologies hold the abbreviations of other languages' words.
    abbreviation = re.sub(r"\([^()]*\)", "", head[1]).strip(" ,\n")
    part = next((name for short, name in _GCIDE_PARTS if abbreviation.startswith(short)), None)
    body = _GCIDE_END.split(entry.text[head.end() :].strip("\n"))[0]
    definition = one_line(_GCIDE_NOISE.sub("", one_line(body))).strip(" ;:")
    return Sense(part, definition) if part and definition else None


def foldoc_subject(entry: Entry) -> Subject | None:
    """Domain and first paragraph of an article of FOLDOC; None without a domain, as of references."""
    _, _, body = entry.text.partition("\n")
    found = _FOLDOC_DOMAIN.match(body)
    if found is None:
        return None
    text = one_line(found[2].split("\n\n")[0].replace("{", "").replace("}", ""))
    return Subject(one_line(found[1]).split(",")[0].strip(), text) if text else None


def one_line(text: str) -> str:
    """Any white space as one space."""
    return " ".join(text.split())


def sentences(text: str, num_words: range) -> Iterator[str]:
    """Sentences with so many words."""
    found = (match.group().strip() for match in _SENTENCE.finditer(one_line(text)))
    return (sentence for sentence in found if len(sentence.split()) in num_words)
