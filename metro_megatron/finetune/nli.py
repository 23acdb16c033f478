"""SNLI and ANLI from their own JSON lines; with MNLI they are what METRO calls MNLI+."""

from functools import partial
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.finetune.benchmark import Benchmark, Line, Pair, Part, pairs
from metro_megatron.finetune.examples import LabelledTexts, class_among, text_of
from metro_megatron.finetune.names import NLI as NLI_LABELS
from metro_megatron.finetune.tasks.classification import Classification

_ANLI_LABELS = {"e": "entailment", "n": "neutral", "c": "contradiction"}
_ROUNDS = ("R1", "R2", "R3")
_NO_MAJORITY = "-"


def snli(line: Line) -> list[Pair]:
    """Pairs on whose label the annotators did not agree are left out, as everywhere."""
    label = text_of(line, "gold_label")
    if label == _NO_MAJORITY:
        return []
    pair = (text_of(line, "sentence1"), text_of(line, "sentence2"))
    return [(*pair, class_among(label, NLI_LABELS), line.get("pairID"), None)]


def anli(line: Line) -> list[Pair]:
    """The context with the hypothesis."""
    label = text_of(line, "label")
    if label not in _ANLI_LABELS:
        raise UserError(f"label is {label!r}, must be one of {', '.join(_ANLI_LABELS)}")
    return [(text_of(line, "context"), text_of(line, "hypothesis"), _ANLI_LABELS[label], line.get("uid"), None)]


def rounds(path: Path) -> LabelledTexts[str]:
    """A file of ANLI's first round with those of the others."""
    found = [pairs(path.parents[1] / name / path.name, anli) for name in _ROUNDS]
    return LabelledTexts(
        [text for one in found for text in one.first],
        [text for one in found for text in one.second or ()],
        [label for one in found for label in one.labels],
        [uid for one in found for uid in one.ids],
    )


_SNLI = {split: Part((f"snli_1.0_{split}.jsonl",), partial(pairs, read=snli)) for split in ("train", "dev", "test")}
_ANLI_ROUNDS = {name.lower(): Part((f"{name}/dev.jsonl",), partial(pairs, read=anli)) for name in _ROUNDS}

NLI = {
    "snli": Benchmark("snli_1.0", Classification, ("accuracy",), _SNLI["train"], _SNLI["dev"], {"test": _SNLI["test"]}),
    "anli": Benchmark(
        "anli_v1.0",
        Classification,
        ("accuracy",),
        Part(("R1/train.jsonl",), rounds),
        Part(("R1/dev.jsonl",), rounds),
        _ANLI_ROUNDS,
    ),
}
"""By the name of the task on the command line."""
