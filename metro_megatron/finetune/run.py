"""Fine-tuning an exported model with transformers' Trainer by METRO's recipe, whatever the task."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, set_seed

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.finetune.models import build_model, read_config, read_tokenizer, write_model
from metro_megatron.finetune.others import ask_others
from metro_megatron.finetune.progress import Progress
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Outputs, Row, Task
from metro_megatron.finetune.trainer import ByLength, RecipeTrainer, class_weights, training_arguments
from metro_megatron.hf.export import EXPORTED_FILES

OUTPUT_FILES = (*EXPORTED_FILES, "metrics.json", "predictions.jsonl", "predictions_*.jsonl")


def finetune(task: Task[Any], model_folder: Path, output: Path, recipe: Recipe) -> dict[str, Any]:
    """Train on task.train, score on task.validation, write the model, its predictions and metrics.json to `output`.

    Returns what metrics.json holds. The head is always fresh; with recipe.from_scratch all weights are. Raises
    UserError for a model folder that is not an export, labels that do not fit, or a foreign output folder.
    """
    start = time.monotonic()
    refuse_foreign(output, OUTPUT_FILES)
    problems = recipe.problems()
    if problems:
        raise UserError(problems)
    settings, *_ = [one.settings() for one in (task, *task.others.values())]
    config = read_config(model_folder, settings)
    tokenizer_folder = Path(recipe.tokenizer) if recipe.tokenizer else model_folder
    tokenizer = read_tokenizer(tokenizer_folder, config, recipe.max_length)
    train, validation = (task.encode(tokenizer, examples) for examples in (task.train, task.validation))
    weights = class_weights(recipe, train.rows, config)
    if is_first_process():
        print(
            f"{len(task.train)} training and {len(task.validation)} validation {task.unit}, {task.describe_labels()}; "
            f"{train.num_cut} and {validation.num_cut} cut to {tokenizer.model_max_length} tokens",
            flush=True,
        )
    # The head, the order of the rows and dropout follow from here: nothing random may come before.
    set_seed(recipe.seed)
    model = build_model(task.head, model_folder, config, recipe.from_scratch)
    by_length = ByLength(validation.rows)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RecipeTrainer(
            recipe,
            weights,
            model=model,
            args=training_arguments(recipe, scratch, len(train.rows), task.score_names[0]),
            train_dataset=train.rows,
            eval_dataset=by_length.rows,
            data_collator=task.collator(tokenizer),
            compute_metrics=lambda prediction: task.scores(by_length.outputs(prediction), validation.rows),
        )
        trained = _train(trainer, by_length, task)
        asked = ask_others(task, tokenizer, lambda rows: _outputs(trainer, rows))
    other_scores = {f"{key}_{name}": score for name, one in asked.items() for key, score in one.scores.items()}
    result = {
        "task": task.benchmark or task.name,
        "model": str(model_folder),
        **trained.epochs[trained.epoch - 1],
        **other_scores,
        "score_names": [*task.score_names, *other_scores],
        **task.facts(),
        "remarks": task.remarks(trained.outputs, validation.rows),
        "epoch": trained.epoch,
        "epochs": trained.epochs,
        "num_train": len(task.train),
        "num_validation": len(task.validation),
        "num_cut": train.num_cut + validation.num_cut,
        "recipe": {**asdict(recipe), "class_weights": list(recipe.class_weights)},  # as JSON has it
        "training": trained.cost,
        "seconds": time.monotonic() - start,
    }
    if is_first_process():
        lines = {"predictions.jsonl": task.predictions(trained.outputs, validation.rows)}
        lines |= {f"predictions_{name}.jsonl": one.predictions for name, one in asked.items()}
        _write(output, model, tokenizer_folder, result, lines)
    return result


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
    """Seconds in training steps, how many there were, forwards of the model, and texts per second."""


def _train(trainer: RecipeTrainer, validation: ByLength, task: Task[Any]) -> Trained:
    progress = Progress(task.score_names, task.has_validation_loss)
    trainer.add_callback(progress)
    trainer.train()
    outputs = validation.outputs(trainer.predict(validation.rows))  # type: ignore[arg-type]
    first = [epoch[task.score_names[0]] for epoch in progress.epochs]
    epoch = int(np.argmax(first)) + 1 if trainer.recipe.keep_best else len(first)
    return Trained(progress.epochs, epoch, outputs, trainer.cost(progress.seconds))


def _outputs(trainer: RecipeTrainer, rows: Sequence[Row]) -> Outputs:
    """The trained model's for rows that may have no labels."""
    by_length = ByLength(rows)
    trainer.compute_metrics = None
    return by_length.outputs(trainer.predict(by_length.rows))  # type: ignore[arg-type]


def _write(
    output: Path,
    model: PreTrainedModel,
    tokenizer_folder: Path,
    result: dict[str, Any],
    predictions: Mapping[str, list[dict[str, Any]]],
) -> None:
    """The model, its tokenizer, metrics.json and files of predictions by their names."""
    with whole_folder(output, OUTPUT_FILES) as folder:
        write_model(model, tokenizer_folder, folder)
        for name, lines in predictions.items():
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
