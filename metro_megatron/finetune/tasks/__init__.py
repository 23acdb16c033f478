"""The tasks there are. A new one is a file here, and an entry in both lines below."""

from typing import Any, Literal, TypeAlias

from metro_megatron.finetune.task import Task
from metro_megatron.finetune.tasks.classification import Classification
from metro_megatron.finetune.tasks.regression import Regression

TaskName: TypeAlias = Literal["classification", "regression"]
TASKS: dict[TaskName, type[Task[Any]]] = {"classification": Classification, "regression": Regression}
