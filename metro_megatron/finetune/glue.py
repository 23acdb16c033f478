"""GLUE's tasks from its own files: tab separated, never quoted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.finetune.benchmark import Benchmark, Part
from metro_megatron.finetune.examples import LabelledTexts, class_among, class_label, labelled_texts, text_of
from metro_megatron.finetune.names import NLI, RTE
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.tasks.grouped import CATEGORIES, Diagnostic
from metro_megatron.finetune.tasks.regression import Regression, number_label
from metro_megatron.text.rows import Row, each_row, text_file

_SENTENCES = ("sentence1", "sentence2")
_COLA_HEADER = ("source", "label", "mark", "sentence")
_ID_COLUMNS = ("index", "id")
_FULL_COLUMNS = ("Premise", "Hypothesis", "Label")
_CATEGORIES = dict(
    zip(("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge"), CATEGORIES, strict=True)
)
"""Of diagnostic-full.tsv by their columns, which hold the phenomena."""


def read_glue(
    path: Path,
    columns: Sequence[str],
    label: str | None,
    read_label: Callable[[Any], Any] = class_label,
    header: Sequence[str] | None = None,
) -> LabelledTexts[Any]:
    """The texts in `columns` and their labels (label None: there are none) of one file.

    Labelled rows with more or fewer fields than the header, of which QQP has some, are left out and counted. Raises
    UserError for a file with other columns, and for rows by line.
    """
    rows, ragged = _rows(path, (*columns, *([label] if label else [])), header)
    if ragged and label is None:
        raise UserError(f"{path}, {ragged[0]}: has not as many fields as the header; fetch the file again")
    if ragged and is_first_process():
        print(
            f"{path}: {len(ragged)} of {len(rows) + len(ragged)} rows have too many or too few fields: left out",
            flush=True,
        )

    def read(row: dict[str, Any]) -> tuple[list[str], Any, Any]:
        number = next((row[name] for name in _ID_COLUMNS if name in row), None)
        return [text_of(row, name) for name in columns], label and read_label(row[label]), number

    return labelled_texts(each_row(path, rows, read), label is not None)


def _rows(path: Path, wanted: Sequence[str], header: Sequence[str] | None) -> tuple[list[Row], list[str]]:
    """The wanted columns and the ids of all rows, and where the rows are that do not fit the header."""
    rows, ragged = [], []
    with text_file(path) as file:
        lines = enumerate((line.rstrip("\r\n") for line in file), start=1)
        names = list(header) if header else [name.strip() for name in next(lines, (0, ""))[1].split("\t")]
        # MNLI's parse trees, which nobody reads, are most of its bytes.
        kept = [(name, names.index(name)) for name in (*wanted, *_ID_COLUMNS) if name in names]
        for number, line in lines:
            fields = line.split("\t")
            if len(fields) == len(names):
                rows.append(Row(f"line {number}", {name: fields[place] for name, place in kept}))
            elif line:
                ragged.append(f"line {number}")
    missing = [name for name in wanted if name not in names]
    if missing or not rows:
        raise UserError(
            f"{path}: {f'has no column {missing[0]}' if missing else 'has no rows'}, but {', '.join(names)}; give the "
            "file as GLUE hands it out"
        )
    return rows, ragged


def _task(
    folder: str,
    columns: Sequence[str],
    scores: Sequence[str],
    label: str = "label",
    header: Sequence[str] | None = None,
    labels: Sequence[str] = ("0", "1"),
    **others: Part,
) -> Benchmark:
    """A task of train.tsv, dev.tsv and test.tsv, which has no labels, and after an id only the texts."""
    is_regression = "spearman" in scores
    read_label = number_label if is_regression else partial(class_among, names=labels)
    labelled = partial(read_glue, columns=columns, label=label, read_label=read_label, header=header)
    return Benchmark(
        folder,
        Regression if is_regression else Classification,
        tuple(scores),
        train=Part(("train.tsv",), labelled),
        validation=Part(("dev.tsv",), labelled),
        others=others or {"test": Part(("test.tsv",), partial(read_glue, columns=columns, label=None))},
    )


def read_diagnostic(path: Path) -> LabelledTexts[str]:
    """AX's pairs: without labels as the server hands them out, with labels and categories from diagnostic-full.tsv.

    Rows of the latter, which has no ids, are the server's in their order.
    """
    if "full" not in path.name:
        return read_glue(path, _SENTENCES, None)
    rows, ragged = _rows(path, (*_CATEGORIES, *_FULL_COLUMNS), None)
    if ragged:
        raise UserError(f"{path}, {ragged[0]}: has not as many fields as the header; fetch the file again")

    def read(row: dict[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
        first, second, label = (text_of(row, name) for name in _FULL_COLUMNS)
        categories = tuple(_CATEGORIES[name] for name in _CATEGORIES if row[name].strip())
        return first, second, class_among(label, NLI), categories

    first, second, labels, groups = map(list, zip(*each_row(path, rows, read), strict=True))
    return LabelledTexts(first, second, labels, [str(number) for number in range(len(first))], groups)


_MNLI_LABELLED = partial(read_glue, columns=_SENTENCES, label="gold_label", read_label=partial(class_among, names=NLI))
_UNLABELLED_PAIRS = partial(read_glue, columns=_SENTENCES, label=None)
_DIAGNOSTIC = Part(
    tuple(
        f"{folder}{name}"
        for names in (("diagnostic-full.tsv",), ("diagnostic.tsv", "AX.tsv"))
        for folder in ("../diagnostic/", "../diagnostics/", "../AX/", "")
        for name in names
    ),
    read_diagnostic,
    Diagnostic,
    Diagnostic.own_scores,
)
_MNLI = replace(
    _task(
        "MNLI",
        _SENTENCES,
        ("accuracy",),
        label="gold_label",
        labels=NLI,
        mm=Part(("dev_mismatched.tsv",), _MNLI_LABELLED),
        test_m=Part(("test_matched.tsv",), _UNLABELLED_PAIRS),
        test_mm=Part(("test_mismatched.tsv",), _UNLABELLED_PAIRS),
        ax=_DIAGNOSTIC,
    ),
    validation=Part(("dev_matched.tsv",), _MNLI_LABELLED),
)

GLUE = {
    "cola": _task("CoLA", ("sentence",), ("mcc", "accuracy"), header=_COLA_HEADER),
    "sst2": _task("SST-2", ("sentence",), ("accuracy",)),
    "mrpc": _task("MRPC", ("#1 String", "#2 String"), ("accuracy", "f1"), label="Quality"),
    "stsb": _task("STS-B", _SENTENCES, ("spearman", "pearson"), label="score"),
    "qqp": _task("QQP", ("question1", "question2"), ("accuracy", "f1"), label="is_duplicate"),
    "mnli": _MNLI,
    "qnli": _task("QNLI", ("question", "sentence"), ("accuracy",), labels=RTE),
    "rte": _task("RTE", _SENTENCES, ("accuracy",), labels=RTE),
    "wnli": _task("WNLI", _SENTENCES, ("accuracy",)),
    "ax": replace(_MNLI, others={"ax": _DIAGNOSTIC}),
}
"""By the name of the task on the command line. AX is asked of a model of MNLI."""
