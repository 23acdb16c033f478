"""Tasks of public benchmarks from the files that these hand out: which file is what, and where it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.finetune.task import Task


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
        folder = data / self.folder if (data / self.folder).is_dir() else data
        parts = {"train": self.train, "validation": self.validation, **self.others}
        missing = [
            f"{folder / part.files[0]}: no such file; --data is the folder of the benchmark as it is downloaded"
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


def _path(folder: Path, part: Part) -> Path | None:
    return next((folder / file for file in part.files if (folder / file).is_file()), None)
