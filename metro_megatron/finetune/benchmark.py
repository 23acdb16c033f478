"""Tasks of public benchmarks from the files that these hand out: which file is what, and where it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os.path import normpath
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from metro_megatron.errors import UserError
from metro_megatron.finetune.examples import LabelledTexts
from metro_megatron.finetune.tables import read_table
from metro_megatron.finetune.task import Task
from metro_megatron.text.rows import each_row

Found = TypeVar("Found")
Line: TypeAlias = dict[str, Any]
"""A row of the file."""
Pair: TypeAlias = tuple[str, str, str | None, Any, Any]
"""Both texts, label, id, group."""


@dataclass(frozen=True)
class Part:
    """A file of a task."""

    files: tuple[str, ...]
    """Under the task's folder; the first that is there."""
    read: Callable[[Path], Any]
    """Its examples. Raises UserError, for rows by line."""
    task: type[Task[Any]] | None = None
    scores: tuple[str, ...] = ()
    """How it is scored, if not as the validation is."""


@dataclass(frozen=True)
class Benchmark:
    """A task as a benchmark hands it out."""

    folder: str
    """In that of the benchmark."""
    task: type[Task[Any]]
    scores: tuple[str, ...]
    """The figures that are published; the first is what models are compared by."""
    train: Part
    validation: Part
    others: Mapping[str, Part] = field(default_factory=dict)
    """What else the model is asked, where it is there."""

    def load(self, name: str, data: Path) -> Task[Any]:
        """The task from the benchmark's folder, or the task's. Raises UserError with the problems of all files.

        Of `others` only the one that has the task's name must be there.
        """
        folder = data if _path(data, self.train) else data / self.folder
        parts = {"train": self.train, "validation": self.validation, **self.others}
        missing = [
            f"{normpath(folder / part.files[0])}: no such file; --data is the benchmark's folder as it is downloaded"
            for key, part in parts.items()
            if key in ("train", "validation", name) and _path(folder, part) is None
        ]
        if missing:
            raise UserError(missing)
        found, problems = {}, []
        for key, part in parts.items():
            path = _path(folder, part)
            try:
                if path:
                    found[key] = part.read(path)
                    problems += _unlabelled(path, found[key], may_lack=key in self.others)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        train, validation = found.pop("train"), found.pop("validation")
        others = {key: self._other(key)(train, examples) for key, examples in found.items()}
        return self.task(train, validation, others, name, self.scores)

    def _other(self, key: str) -> Callable[[Any, Any], Task[Any]]:
        part = self.others[key]
        return partial(part.task or self.task, published_scores=part.scores or self.scores)


def pairs(path: Path, read: Callable[[Line], list[Pair]]) -> LabelledTexts[str]:
    """The pairs that `read` makes of every line."""
    first, second, labels, ids, groups = zip(*each_line(path, read), strict=True)
    known = [label for label in labels if label is not None]
    if 0 < len(known) < len(labels):
        raise UserError(_lacking(path, len(labels) - len(known), len(labels)))
    return LabelledTexts(list(first), list(second), known, list(ids), [] if None in groups else list(groups))


def each_line(path: Path, read: Callable[[Line], list[Found]]) -> list[Found]:
    """All that `read` makes of every line.

    Raises UserError by line, also for a key that is not there, and where all lines together make nothing.
    """

    def checked(line: Line) -> list[Found]:
        try:
            return read(line)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"has not the form of the benchmark's files ({type(error).__name__}: {error})") from error

    found = [one for of_line in each_row(path, read_table(path), checked) for one in of_line]
    if not found:
        raise UserError(f"{path}: holds no examples; fetch the file again")
    return found


def _unlabelled(path: Path, examples: Any, may_lack: bool) -> list[str]:
    """The problem, if there is one, of examples without labels; may_lack: all of them may be so."""
    if isinstance(examples, LabelledTexts):
        lacking = 0 if examples.labels else len(examples)
    else:
        lacking = sum(not one.is_labelled for one in examples)
    return [] if not lacking or (may_lack and lacking == len(examples)) else [_lacking(path, lacking, len(examples))]


def _lacking(path: Path, number: int, size: int) -> str:
    return f"{path}: {number} of {size} examples have no label; fetch the file again"


def _path(folder: Path, part: Part) -> Path | None:
    return next((folder / file for file in part.files if (folder / file).is_file()), None)
