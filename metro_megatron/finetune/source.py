"""Where the examples of a task stand, as options, without what fine-tuning needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from metro_megatron.errors import UserError
from metro_megatron.finetune.tables import Layout
from metro_megatron.finetune.tasks import (
    TOGETHER,
    BenchmarkName,
    TaskKind,
    TaskName,
    TogetherName,
    benchmark,
    task_class,
)

if TYPE_CHECKING:
    from metro_megatron.finetune.task import Task


@dataclass(frozen=True)
class Source:
    """The files of one task: a benchmark's own, or a user's."""

    data: str = ""
    """Folder of the benchmark's files as they are downloaded, or of the one task in it; for tasks of benchmarks."""
    train_file: str = ""
    """Examples to learn from, for the other tasks: CSV, TSV, JSONL, JSON (also .gz) or Parquet."""
    validation_file: str = ""
    """Examples to be scored on, likewise."""
    predict_file: str = ""
    """Examples without labels that are predicted in the end, likewise; without it: none."""
    layout: Layout = field(default_factory=Layout)

    def read_together(self, name: TogetherName) -> dict[str, Task[Any]]:
        """The tasks that one encoder learns at once, by name, from folders beside each other. Raises UserError."""
        found, problems = {}, []
        for one in TOGETHER[name]:
            try:
                found[one] = self.read(one)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(list(dict.fromkeys(problems)))
        return found

    def read(self, name: TaskName) -> Task[Any]:
        """The task of that name with its examples. Raises UserError, for options by name, for rows by file and line."""
        is_free = name in get_args(TaskKind)
        needed = ("train_file", "validation_file") if is_free else ("data",)
        foreign = ("data",) if is_free else ("train_file", "validation_file", "predict_file")
        problems = [f"--{one}: needed for --task {name}; see --help" for one in needed if not getattr(self, one)]
        reason = "reads train_file and validation_file" if is_free else "reads the benchmark's own files from --data"
        problems += [f"--{one}: --task {name} {reason}" for one in foreign if getattr(self, one)]
        if not is_free and self.layout != Layout():
            problems.append(f"--text_columns and other options of tables: --task {name} {reason}")
        if problems:
            raise UserError(problems)
        if not is_free:
            return benchmark(cast(BenchmarkName, name)).load(name, Path(self.data))
        predict = Path(self.predict_file) if self.predict_file else None
        kind = task_class(cast(TaskKind, name))
        return kind.read(Path(self.train_file), Path(self.validation_file), predict, self.layout)
