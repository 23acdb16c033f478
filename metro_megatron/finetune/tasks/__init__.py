"""The tasks there are. A new one is a file here, and an entry in both places below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from metro_megatron.finetune.task import Task

TaskName: TypeAlias = Literal["classification", "regression"]


def task_class(name: TaskName) -> type[Task[Any]]:
    """The task of that name."""
    # Late, so that a command line knows the names without torch.
    from metro_megatron.finetune.tasks.classification import Classification
    from metro_megatron.finetune.tasks.regression import Regression

    tasks: dict[TaskName, type[Task[Any]]] = {"classification": Classification, "regression": Regression}
    return tasks[name]
