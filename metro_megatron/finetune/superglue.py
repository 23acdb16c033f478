"""SuperGLUE's tasks from its own JSON lines, in the forms that METRO gives them (appendix A, as in MT-DNN)."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.finetune.benchmark import Benchmark, Line, Pair, Part, each_line, pairs
from metro_megatron.finetune.examples import LabelledTexts, class_among, text_of
from metro_megatron.finetune.glue import read_glue
from metro_megatron.finetune.names import BOOLEAN, NLI, RTE
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.tasks.grouped import CATEGORIES, Diagnostic, GroupedAnswers, MinimalPairs
from metro_megatron.finetune.tasks.multiple_choice import Choice, MultipleChoice, choice_label
from metro_megatron.finetune.tasks.ranking import Query, Ranking

_CONNECTIVES = {"cause": "because", "effect": "so"}
_GAP = "@placeholder"
_CATEGORIES = dict(
    zip(CATEGORIES, ("lexical-semantics", "predicate-argument-structure", "logic", "knowledge"), strict=True)
)
"""Keys of AX-b's lines."""
_WNLI_FILES = {"wnli": "dev", "wnli_test": "test"}
_YES_OR_NO = (*BOOLEAN, "0", "1")
_SEED = 0
"""Of the right candidates and the orders that ReCoRD's training pairs are drawn in."""


def two_texts(
    line: Line, first: str, second: str, names: Sequence[str] = _YES_OR_NO, group: str | None = None
) -> list[Pair]:
    """A pair as it stands in two keys."""
    label = _label(line, names)
    return [(text_of(line, first), text_of(line, second), label, line.get("idx"), line.get(group) if group else None)]


def diagnosed(line: Line) -> list[Pair]:
    """A pair with the categories of what it shows; a line has the keys of its own alone."""
    categories = tuple(key for key, name in _CATEGORIES.items() if line.get(name))
    return [(text_of(line, "sentence1"), text_of(line, "sentence2"), _label(line, RTE), line.get("idx"), categories)]


def winograd_of_glue(path: Path) -> LabelledTexts[str]:
    """WNLI's pairs, with labels as WSC's: the same question, of a text and it with the pronoun replaced."""
    return read_glue(path, ("sentence1", "sentence2"), None if "test" in path.name else "label", _yes_or_no)


def multirc(line: Line) -> list[Pair]:
    """The passage, with the question and each of its answers."""
    passage = line["passage"]
    return [
        (
            text_of(passage, "text"),
            f"{text_of(question, 'question')} {text_of(answer, 'text')}",
            _label(answer),
            {"paragraph": line["idx"], "question": question["idx"], "answer": answer["idx"]},
            (line["idx"], question["idx"]),
        )
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def wic(line: Line) -> list[Pair]:
    """The word before the first sentence, with the second."""
    first = f"{text_of(line, 'word')} {text_of(line, 'sentence1')}"
    return [(first, text_of(line, "sentence2"), _label(line), line.get("idx"), None)]


def wsc(line: Line) -> list[Pair]:
    """The text, with itself where the candidate stands for the pronoun, and a comma or stop behind it stays."""
    text, target = text_of(line, "text"), line["target"]
    words, pronoun, begin = text.split(), text_of(target, "span2_text"), target["span2_index"]
    end = begin + len(pronoun.split())
    if not 0 <= begin < len(words):
        raise UserError(f"span2_index is {begin}, but the text has {len(words)} words")
    spelled, candidate = " ".join(words[begin:end]), text_of(target, "span1_text")
    filled, is_there = re.subn(rf"\b{re.escape(pronoun)}\b", lambda _: candidate, spelled, count=1)
    words[begin:end] = [filled if is_there else candidate]
    return [(text, " ".join(words), _label(line), line.get("idx"), None)]


def copa(path: Path) -> list[Choice]:
    """The premise, with "because" or "so" before each of the choices."""

    def read(line: Line) -> list[Choice]:
        connective = _CONNECTIVES[text_of(line, "question")]
        choices = tuple(f"{connective} {text_of(line, name)}" for name in ("choice1", "choice2"))
        label = choice_label(line["label"], 2) if "label" in line else None
        return [Choice(text_of(line, "premise"), choices, label, line.get("idx"))]

    return each_line(path, read)


def queries(path: Path) -> list[Query]:
    """ReCoRD's passages with each of their queries, the gap filled by every entity."""

    def read(line: Line) -> list[Query]:
        passage = text_of(line["passage"], "text").replace("\n", " ")
        spans = line["passage"]["entities"]
        entities = tuple(dict.fromkeys(passage[one["start"] : one["end"] + 1] for one in spans))
        return [_query(passage, entities, one) for one in line["qas"]]

    return each_line(path, read)


def ranked_pairs(path: Path) -> list[Choice]:
    """ReCoRD's training pairs: each entity that is no answer with an answer that is drawn, and so is their order."""
    generator = random.Random(_SEED)
    found = []
    for query in queries(path):
        filled = dict(zip(query.entities, query.choices, strict=True))
        answers = [one for one in dict.fromkeys(query.answers or ()) if one in filled]
        for wrong in [one for one in query.entities if answers and one not in answers]:
            label = generator.randrange(2)
            both = (filled[generator.choice(answers)], filled[wrong])
            found.append(Choice(query.text, both[::-1] if label else both, label, query.id))
    if not found:
        raise UserError(f"{path}: holds no query with an answer and an entity that is none; fetch the file again")
    return found


def _query(passage: str, entities: tuple[str, ...], line: Line) -> Query:
    query = text_of(line, "query")
    if _GAP not in query:
        raise UserError(f"query has no {_GAP}")
    answers = tuple(text_of(one, "text") for one in line["answers"]) if "answers" in line else None
    if answers == ():
        raise UserError("query has no answers")
    filled = tuple(query.replace(_GAP, entity) for entity in entities)
    return Query(passage, filled, None if answers is None else 0, line.get("idx"), entities, answers)


def _yes_or_no(value: Any) -> str:
    return BOOLEAN[int(class_among(value, ("0", "1")))]


def _label(line: Line, names: Sequence[str] = _YES_OR_NO) -> str | None:
    if "label" not in line:
        return None
    value = line["label"]
    return class_among(str(value).lower() if isinstance(value, bool | int) else value, names)


def _task(
    folder: str, task: type[Any], scores: Sequence[str], read: Callable[[Path], Any], **others: Part
) -> Benchmark:
    train, validation, test = (Part((f"{split}.jsonl",), read) for split in ("train", "val", "test"))
    return Benchmark(folder, task, tuple(scores), train, validation, {**others, "test": test})


def _pairs(folder: str, scores: Sequence[str], read: Callable[[Line], list[Pair]], **others: Part) -> Benchmark:
    return _task(folder, Classification, scores, partial(pairs, read=read), **others)


_HYPOTHESIS = partial(two_texts, first="premise", second="hypothesis")
_AX_B = Part(("../AX-b/AX-b.jsonl", "AX-b.jsonl"), partial(pairs, read=diagnosed), Diagnostic, Diagnostic.own_scores)
_ENTAILMENT = partial(_HYPOTHESIS, names=RTE)
_AX_G = Part(
    ("../AX-g/AX-g.jsonl", "AX-g.jsonl"),
    partial(pairs, read=partial(_ENTAILMENT, group="pair_id")),
    MinimalPairs,
    ("accuracy", "gender_parity"),
)
_GLUE_RTE = Part(("test.tsv",), partial(read_glue, columns=("sentence1", "sentence2"), label=None))
_RTE = _pairs("RTE", ("accuracy",), _ENTAILMENT, axb=_AX_B, axg=_AX_G, glue_test=_GLUE_RTE)
_WNLI = {name: Part((f"../WNLI/{file}.tsv",), winograd_of_glue) for name, file in _WNLI_FILES.items()}

SUPERGLUE = {
    "boolq": _pairs("BoolQ", ("accuracy",), partial(two_texts, first="passage", second="question")),
    "cb": _pairs("CB", ("accuracy", "macro_f1"), partial(_HYPOTHESIS, names=NLI)),
    "copa": _task("COPA", MultipleChoice, ("accuracy",), copa),
    "multirc": _task("MultiRC", GroupedAnswers, ("f1a", "exact"), partial(pairs, read=multirc)),
    "record": replace(_task("ReCoRD", Ranking, ("f1", "exact"), queries), train=Part(("train.jsonl",), ranked_pairs)),
    "superglue_rte": _RTE,
    "wic": _pairs("WiC", ("accuracy",), wic),
    "wsc": _pairs("WSC", ("accuracy",), wsc, **_WNLI),
    "axb": replace(_RTE, others={"axb": _AX_B}),
    "axg": replace(_RTE, others={"axg": _AX_G}),
}
"""By the name of the task on the command line. AX-b and AX-g are asked of a model of RTE."""
