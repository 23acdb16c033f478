"""Fine-tuning an encoder with transformers' Trainer by METRO's recipe, whatever the task."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.finetune.lesson import Lesson
from metro_megatron.finetune.models import build_model, set_task_dropout, write_model
from metro_megatron.finetune.others import Asked, ask_others
from metro_megatron.finetune.progress import Progress
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Outputs, Task
from metro_megatron.finetune.trainer import ByLength, RecipeTrainer, class_weights, training_arguments
from metro_megatron.hf.export import EXPORTED_FILES

METRICS = "metrics.json"
OUTPUT_FILES = (*EXPORTED_FILES, METRICS, "predictions.jsonl", "predictions_*.jsonl")


def finetune(task: Task[Any], model_folder: Path, output: Path, recipe: Recipe) -> dict[str, Any]:
    """Train on task.train, score on task.validation, write the model, its predictions and metrics.json to `output`.

    Returns what metrics.json holds. The head is always fresh; with recipe.from_scratch all weights are. Raises
    UserError for a folder without a whole encoder, labels that nothing can learn, or a foreign output folder.
    """
    start = time.monotonic()
    refuse_foreign(output, OUTPUT_FILES, METRICS)
    problems = recipe.problems()
    if problems:
        raise UserError(problems)
    lesson = Lesson.read(task, model_folder, recipe)
    weights = class_weights(recipe, task.head, lesson.train.rows, lesson.config)
    lesson.announce()
    # The head, the order of the rows and dropout follow from here: nothing random may come before.
    set_seed(recipe.seed)
    model = build_model(task.head, model_folder, lesson.config, recipe.from_scratch)
    set_task_dropout(model, recipe.task_dropout)
    with _saved_epochs(output) as scratch:
        trained = _train(lesson, model, recipe, weights, scratch)
    result = {
        "model": str(model_folder),
        **lesson.facts(trained.epochs[trained.epoch - 1], trained.outputs, trained.asked),
        "epoch": trained.epoch,
        "epochs": trained.epochs,
        "recipe": asdict(recipe),
        "training": trained.cost,
        "seconds": time.monotonic() - start,
    }
    if is_first_process():
        with whole_folder(output, OUTPUT_FILES, METRICS) as folder:
            predictions = lesson.predictions(trained.outputs, trained.asked)
            write_finetuned(folder, model, lesson.tokenizer_folder, result, predictions)
    return result


def write_finetuned(
    folder: Path,
    model: PreTrainedModel,
    tokenizer_folder: Path,
    result: Mapping[str, Any],
    predictions: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Fill a folder: the model, its tokenizer, metrics.json and files of predictions by their names."""
    folder.mkdir(exist_ok=True)
    write_model(model, tokenizer_folder, folder)
    for name, lines in predictions.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / METRICS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Trained:
    """What training left beside the model."""

    epochs: list[dict[str, float]]
    """Every epoch's scores and loss on validation."""
    epoch: int
    """The one, from 1, whose model is kept."""
    outputs: Outputs
    """The kept model's for the validation rows."""
    cost: dict[str, float]
    """Of the training: `RecipeTrainer.cost`."""
    asked: dict[str, Asked]
    """The kept model's answers to what else the task asks."""


@contextmanager
def _saved_epochs(output: Path) -> Iterator[str]:
    """A folder beside `output` that all processes know, in which the Trainer keeps the best epoch."""
    folder = output.absolute().with_name(f".{output.name}.epochs")
    try:
        yield str(folder)
    finally:
        if is_first_process():
            shutil.rmtree(folder, ignore_errors=True)


def _train(lesson: Lesson, model: PreTrainedModel, recipe: Recipe, weights: Tensor | None, scratch: str) -> Trained:
    task, rows = lesson.task, lesson.validation.rows
    by_length = ByLength(rows)
    progress = Progress(task.score_names, task.has_validation_loss)
    trainer = RecipeTrainer(
        recipe,
        weights,
        model=model,
        args=training_arguments(recipe, scratch, len(lesson.train.rows), task.score_names[0]),
        train_dataset=lesson.train.rows,
        eval_dataset=by_length.rows,
        data_collator=task.collator(lesson.tokenizer),
        compute_metrics=lambda prediction: task.scores(by_length.outputs(prediction), rows),
        callbacks=[progress],
    )
    trainer.train()
    trainer.compute_metrics = None  # what else is asked may have no labels
    outputs = trainer.outputs(rows)
    asked = ask_others(task, lesson.tokenizer, trainer.outputs)
    first = [epoch[task.score_names[0]] for epoch in progress.epochs]
    epoch = int(np.argmax(first)) + 1 if recipe.keep_best else len(first)
    return Trained(progress.epochs, epoch, outputs, trainer.cost(progress.seconds), asked)
