"""SNLI and ANLI from their own JSON lines: what METRO learns beside MNLI, before other tasks (section 5)."""

from functools import partial
from pathlib import Path

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.finetune.benchmark import Benchmark, Part
from metro_megatron.finetune.examples import LabelledTexts, labelled_texts, text_of
from metro_megatron.finetune.tables import each_row, read_table
from metro_megatron.finetune.tasks.classification import Classification

_CLASSES = {"e": "entailment", "n": "neutral", "c": "contradiction"}
_NO_LABEL = "-"
_ROUNDS = ("R1", "R2", "R3")


def read_snli(path: Path) -> LabelledTexts[str]:
    """Pairs with the label that most have given; those without such a label are left out and counted."""
    table = read_table(path)
    rows = [row for row in table if row.values.get("gold_label") != _NO_LABEL]
    if len(rows) < len(table) and is_first_process():
        print(f"{path}: {len(table) - len(rows)} of {len(table)} pairs have no gold label: left out", flush=True)

    def read(row: dict[str, object]) -> tuple[list[str], str, object]:
        texts = [text_of(row, name) for name in ("sentence1", "sentence2")]
        return texts, _class_of(text_of(row, "gold_label"), _CLASSES.values()), row.get("pairID")

    return labelled_texts(each_row(path, rows, read), is_labelled=True)


def read_anli(path: Path) -> LabelledTexts[str]:
    """Pairs of all three rounds; `path` is the file of the first, R1/NAME."""

    def read(row: dict[str, object]) -> tuple[list[str], str, object]:
        label = _class_of(text_of(row, "label"), _CLASSES)
        return [text_of(row, name) for name in ("context", "hypothesis")], _CLASSES[label], row.get("uid")

    files = [path.parents[1] / name / path.name for name in _ROUNDS]
    return labelled_texts([one for file in files for one in each_row(file, read_table(file), read)], is_labelled=True)


def _class_of(label: str, known: object) -> str:
    if label not in known:  # type: ignore[operator]
        raise UserError(f"label {label!r} is none of {', '.join(known)}")  # type: ignore[arg-type]
    return label


_BOTH = partial(Benchmark, task=Classification, scores=("accuracy",))
NLI = {
    "snli": _BOTH(
        "snli_1.0",
        train=Part(("snli_1.0_train.jsonl",), read_snli),
        validation=Part(("snli_1.0_dev.jsonl",), read_snli),
        others={"test": Part(("snli_1.0_test.jsonl",), read_snli)},
    ),
    "anli": _BOTH(
        "anli_v1.0",
        train=Part(("R1/train.jsonl",), read_anli),
        validation=Part(("R1/dev.jsonl",), read_anli),
        others={"test": Part(("R1/test.jsonl",), read_anli)},
    ),
}
"""By the name of the task on the command line."""
