"""Several tasks at once on one encoder, each with a head of its own (METRO section 5; MT-DNN)."""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedConfig, PreTrainedModel, TrainerControl, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import find_labels

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.finetune.lesson import Lesson
from metro_megatron.finetune.models import build_model, set_task_dropout
from metro_megatron.finetune.others import ask_others
from metro_megatron.finetune.progress import Progress
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.run import METRICS, OUTPUT_FILES, write_finetuned
from metro_megatron.finetune.task import Outputs, Row, Task
from metro_megatron.finetune.trainer import RecipeTrainer, row_lengths, training_arguments

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
        return self.base_model.get_input_embeddings()  # type: ignore[operator]


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
        self.models: dict[str, Any] = dict(model.models.items())
        rows = [{**row, TASK: name} for name, lesson in lessons.items() for row in lesson.train.rows]
        collators = {name: _collator(lesson, self.models[name]) for name, lesson in lessons.items()}
        super().__init__(
            recipe, model=model, train_dataset=rows, eval_dataset=[], data_collator=TaskCollator(collators), **kwargs
        )

    def configs(self) -> list[PreTrainedConfig]:
        return [model.config for model in self.models.values()]

    def config_of(self, inputs: Mapping[str, Any]) -> PreTrainedConfig:
        return self.models[inputs[TASK]].config

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
        """Scores of every task by `eval_TASK_SCORE`."""
        metrics: dict[str, float] = {}
        for name, lesson in self.lessons.items():
            outputs = self.outputs_of(name, lesson.validation.rows)
            scores = lesson.task.scores(outputs, lesson.validation.rows)
            metrics |= {f"eval_{name}_{key}": value for key, value in scores.items()}
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def outputs_of(self, name: str, rows: Sequence[Row]) -> Outputs:
        """Those of a task's model for rows, in their order."""
        self.label_names = find_labels(type(self.models[name]))
        return self.outputs([{**row, TASK: name} for row in rows])


def finetune_together(
    tasks: Mapping[str, Task[Any]], model_folder: Path, output: Path, recipe: Recipe
) -> dict[str, Any]:
    """Train one encoder on all tasks; write the model of each to a folder in `output`, and metrics.json beside them.

    Each folder is as `finetune` writes it, so that the next stage may start from it; its head is of its task alone.
    Returns what the outer metrics.json holds. Raises UserError as `finetune` does, and for what is of one task alone.
    """
    start = time.monotonic()
    own_files = ("metrics.json", *tasks)
    _refuse_foreign(output, tasks)
    problems = recipe.problems() + problems_together(recipe)
    if problems:
        raise UserError(problems)
    lessons = {name: Lesson.read(task, model_folder, recipe) for name, task in tasks.items()}
    for lesson in lessons.values():
        lesson.announce()
    set_seed(recipe.seed)
    models = {
        name: build_model(lesson.task.head, model_folder, lesson.config, recipe.from_scratch)
        for name, lesson in lessons.items()
    }
    for model in models.values():
        set_task_dropout(model, recipe.task_dropout)
    trainer, progress = _train(lessons, MultiTaskModel(models), recipe)
    result: dict[str, Any] = {
        "model": str(model_folder),
        "epochs": progress.epochs,
        "recipe": asdict(recipe),
        "training": trainer.cost(progress.seconds),
        "tasks": {},
    }
    with whole_folder(output, own_files) if is_first_process() else nullcontext() as folder:
        for name, lesson in lessons.items():
            outputs = trainer.outputs_of(name, lesson.validation.rows)
            asked = ask_others(lesson.task, lesson.tokenizer, partial(trainer.outputs_of, name))
            scores = lesson.task.scores(outputs, lesson.validation.rows)
            facts = {"model": str(model_folder), **lesson.facts(scores, outputs, asked), "together": list(tasks)}
            result["tasks"][name] = facts
            if folder:
                predictions = lesson.predictions(outputs, asked)
                write_finetuned(folder / name, models[name], lesson.tokenizer_folder, facts, predictions)
        result["seconds"] = time.monotonic() - start
        if folder:
            (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            _refuse_foreign(output, tasks)
    return result


def problems_together(recipe: Recipe) -> list[str]:
    """What of a recipe is of one task alone."""
    if not (recipe.class_weights or recipe.keep_best or recipe.patience):
        return []
    return ["class_weights, keep_best and patience are for one task; leave them where several are learned"]


def _refuse_foreign(output: Path, tasks: Iterable[str]) -> None:
    """Raise UserError for what is no earlier output, in the folders of the tasks too: all of it is replaced."""
    refuse_foreign(output, ("metrics.json", *tasks))
    for name in tasks:
        refuse_foreign(output / name, OUTPUT_FILES, METRICS)


def _train(lessons: Mapping[str, Lesson], model: MultiTaskModel, recipe: Recipe) -> tuple[MultiTaskTrainer, Progress]:
    steps = sum(-(-len(lesson.train.rows) // recipe.batch_size) for lesson in lessons.values())
    progress = Progress([f"{name}_{lesson.task.score_names[0]}" for name, lesson in lessons.items()], has_loss=False)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(recipe, scratch, steps * recipe.batch_size)
        arguments.remove_unused_columns = False  # TaskCollator does it, by the task
        arguments.ddp_find_unused_parameters = True  # heads of tasks that a step is not of
        trainer = MultiTaskTrainer(recipe, lessons, model, args=arguments, callbacks=[progress])
        trainer.train()
    return trainer, progress


def _collator(lesson: Lesson, model: PreTrainedModel) -> Callable[[list[Row]], dict[str, Tensor]]:
    """The task's, which does not see keys that are no parameters of the model's forward, as in the Trainer."""
    names = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
    return RemoveColumnsCollator(lesson.task.collator(lesson.tokenizer), names)


class TaskCollator:
    """A batch of rows of one task, by that task's own collator."""

    def __init__(self, collators: Mapping[str, Callable[[list[Row]], dict[str, Tensor]]]):
        self.collators = collators

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        (name,) = {row[TASK] for row in rows}
        batch = self.collators[name]([{key: value for key, value in row.items() if key != TASK} for row in rows])
        return {**batch, TASK: name}
