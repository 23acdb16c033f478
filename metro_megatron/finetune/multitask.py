"""Several tasks at once on one encoder, each with a head of its own (METRO section 5; MT-DNN)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedConfig, PreTrainedModel, TrainerControl
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import find_labels

from metro_megatron.finetune.lesson import Lesson
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Outputs, Row
from metro_megatron.finetune.trainer import ByLength, RecipeTrainer, row_lengths

TASK = "task"
"""Key of a row, and of a batch, that names its task."""


class MultiTaskModel(nn.Module):
    """Models by task that have one encoder: the one with the most parts (a pooler) replaces those of the others."""

    def __init__(self, models: Mapping[str, PreTrainedModel]):
        super().__init__()
        self.base_model = max((model.base_model for model in models.values()), key=lambda one: len(one.state_dict()))
        for model in models.values():
            setattr(model, model.base_model_prefix, self.base_model)
        self.models = nn.ModuleDict(models)

    def forward(self, task: str, **inputs: Any) -> Mapping[str, Tensor]:
        """The outputs of that task's model."""
        return self.models[task](**inputs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of all."""
        return self.base_model.get_input_embeddings()


class TaskBatches(Sampler[list[int]]):
    """Every epoch all rows of all tasks, in batches of one task each, in an order drawn anew.

    Rows are numbered through all tasks. So a task has as many batches as its size is worth. The generator is its own,
    for all processes draw the same and take turns.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], batch_size: int, by_length: bool, seed: int):
        self.lengths = lengths
        self.rows_per_batch = batch_size
        self.by_length = by_length
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(-(-len(one) // self.rows_per_batch) for one in self.lengths)

    def __iter__(self) -> Iterator[list[int]]:
        batches, first = [], 0
        for lengths in self.lengths:
            if self.by_length:
                order = get_length_grouped_indices(lengths, self.rows_per_batch, generator=self.generator)
            else:
                order = torch.randperm(len(lengths), generator=self.generator).tolist()
            rows = [first + i for i in order]
            batches += [rows[i : i + self.rows_per_batch] for i in range(0, len(rows), self.rows_per_batch)]
            first += len(lengths)
        for i in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[i]


class MultiTaskTrainer(RecipeTrainer):
    """Its steps are of one task each, or of one for each process and part; `lessons` are by task."""

    def __init__(self, recipe: Recipe, lessons: Mapping[str, Lesson], model: MultiTaskModel, **kwargs: Any):
        self.lessons = lessons
        rows = [{**row, TASK: name} for name, lesson in lessons.items() for row in lesson.train.rows]
        collators = {name: lesson.collator(model.models[name]) for name, lesson in lessons.items()}
        super().__init__(
            recipe, model=model, train_dataset=rows, eval_dataset=[], data_collator=TaskCollator(collators), **kwargs
        )

    def configs(self) -> list[PreTrainedConfig]:
        return [model.config for model in self.model.models.values()]

    def config_of(self, inputs: Mapping[str, Any]) -> PreTrainedConfig:
        return self.model.models[inputs[TASK]].config

    def get_train_dataloader(self) -> DataLoader[Row]:
        lengths = [row_lengths(lesson.train.rows) for lesson in self.lessons.values()]
        by_length = self.recipe.batching == "length"
        batches = TaskBatches(lengths, self.args.per_device_train_batch_size, by_length, self.args.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores and loss of every task by `eval_TASK_SCORE`; `eval_loss` is the mean of the losses."""
        metrics, losses = {}, []
        for name, lesson in self.lessons.items():
            outputs, loss = self.ask(name, lesson.validation.rows)
            losses.append(loss)
            scores = lesson.task.scores(outputs, lesson.validation.rows)
            metrics |= {f"eval_{name}_{key}": value for key, value in {**scores, "loss": loss}.items()}
        metrics["eval_loss"] = sum(losses) / len(losses)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def ask(self, name: str, rows: Sequence[Row]) -> tuple[Outputs, float]:
        """The outputs of a task's model for rows of it, and its loss there."""
        by_length = ByLength([{**row, TASK: name} for row in rows])
        self.label_names = find_labels(type(self.model.models[name]))
        prediction = self.predict(by_length.rows)
        return by_length.outputs(prediction), prediction.metrics["test_loss"]


class TaskCollator:
    """A batch of rows of one task, by that task's own collator."""

    def __init__(self, collators: Mapping[str, Callable[[list[Row]], dict[str, Tensor]]]):
        self.collators = collators

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        (name,) = {row[TASK] for row in rows}
        batch = self.collators[name]([{key: value for key, value in row.items() if key != TASK} for row in rows])
        return {**batch, TASK: name}
