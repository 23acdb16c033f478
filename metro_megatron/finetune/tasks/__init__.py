"""The tasks there are. A new kind is a file here, and an entry in both places below; benchmarks are tables beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from metro_megatron.finetune.benchmark import Benchmark
    from metro_megatron.finetune.task import Task

TaskKind: TypeAlias = Literal["classification", "multi_label", "regression", "token", "multiple_choice", "span"]
GlueName: TypeAlias = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]
SuperGlueName: TypeAlias = Literal[
    "boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc", "axb", "axg"
]
SquadName: TypeAlias = Literal["squad", "squad2"]
NliName: TypeAlias = Literal["snli", "anli"]
BenchmarkName: TypeAlias = Literal[GlueName, SuperGlueName, SquadName, NliName]
TogetherName: TypeAlias = Literal["mnli_plus"]
TaskName: TypeAlias = Literal[TaskKind, BenchmarkName, TogetherName]

TOGETHER: dict[TogetherName, tuple[BenchmarkName, ...]] = {"mnli_plus": ("mnli", "snli", "anli")}
"""Tasks that one encoder learns at once (METRO section 5: MNLI+)."""


def task_class(name: TaskKind) -> type[Task[Any]]:
    """The task of that name."""
    # Late, so that a command line knows the names without torch.
    from metro_megatron.finetune.tasks.classification import Classification
    from metro_megatron.finetune.tasks.multi_label import MultiLabel
    from metro_megatron.finetune.tasks.multiple_choice import MultipleChoice
    from metro_megatron.finetune.tasks.regression import Regression
    from metro_megatron.finetune.tasks.span import Span
    from metro_megatron.finetune.tasks.token import Token

    tasks: dict[TaskKind, type[Task[Any]]] = {
        "classification": Classification,
        "multi_label": MultiLabel,
        "regression": Regression,
        "token": Token,
        "multiple_choice": MultipleChoice,
        "span": Span,
    }
    return tasks[name]


def benchmark(name: BenchmarkName) -> Benchmark:
    """The benchmark's task of that name."""
    from metro_megatron.finetune.glue import GLUE
    from metro_megatron.finetune.nli import NLI
    from metro_megatron.finetune.squad import SQUAD
    from metro_megatron.finetune.superglue import SUPERGLUE

    return {**GLUE, **SUPERGLUE, **SQUAD, **NLI}[name]
