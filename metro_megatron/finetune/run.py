"""Fine-tuning an exported model with transformers' Trainer by METRO's recipe, whatever the task."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from metro_megatron.errors import UserError
from metro_megatron.files import refuse_foreign, whole_folder
from metro_megatron.finetune.models import build_model, read_config, read_tokenizer, write_model
from metro_megatron.finetune.others import ask_others
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Encoded, Outputs, Row, Task
from metro_megatron.hf.export import EXPORTED_FILES

OUTPUT_FILES = (*EXPORTED_FILES, "metrics.json", "predictions.jsonl", "predictions_*.jsonl")
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}


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
    settings = [one.settings() for one in (task, *task.others.values())]
    config = read_config(model_folder, settings[0])
    tokenizer_folder = Path(recipe.tokenizer) if recipe.tokenizer else model_folder
    tokenizer = read_tokenizer(tokenizer_folder, config, recipe.max_length)
    train, validation = (task.encode(tokenizer, examples) for examples in (task.train, task.validation))
    print(
        f"{len(task.train)} training and {len(task.validation)} validation {task.unit}, {task.describe_labels()}; "
        f"{train.num_cut} and {validation.num_cut} cut to {tokenizer.model_max_length} tokens",
        flush=True,
    )
    # The head, the order of the rows and dropout follow from here: nothing random may come before.
    set_seed(recipe.seed)
    model = build_model(task.head, model_folder, config, recipe.from_scratch)
    epochs, predict = _train(task, model, tokenizer, (train, validation), recipe)
    outputs = predict(validation.rows)
    asked = ask_others(task, tokenizer, predict)
    scores = {f"{key}_{name}": value for name, one in asked.items() for key, value in one.scores.items()}
    result = {
        "task": task.benchmark or task.name,
        "model": str(model_folder),
        **epochs[-1],
        **scores,
        "score_names": [*task.score_names, *scores],
        **task.facts(),
        "remarks": task.remarks(outputs, validation.rows),
        "epochs": epochs,
        "num_train": len(task.train),
        "num_validation": len(task.validation),
        "num_cut": train.num_cut + validation.num_cut,
        "recipe": asdict(recipe),
        "seconds": time.monotonic() - start,
    }
    lines = {"": task.predictions(outputs, validation.rows), **{name: one.predictions for name, one in asked.items()}}
    _write(output, model, tokenizer_folder, result, lines)
    return result


def _train(
    task: Task[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoded: tuple[Encoded, Encoded],
    recipe: Recipe,
) -> tuple[list[dict[str, float]], Callable[[list[Row]], Outputs]]:
    """Every epoch's scores and loss on validation, and what gives the trained model's outputs for rows."""
    train, validation = encoded
    progress = _Progress((*task.score_names, *(["loss"] if task.has_validation_loss else [])))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, scratch, len(train.rows)),
            train_dataset=train.rows,  # type: ignore[arg-type]
            eval_dataset=validation.rows,  # type: ignore[arg-type]
            data_collator=task.collator(tokenizer),
            compute_metrics=lambda prediction: task.scores(_outputs(prediction), validation.rows),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.compute_metrics = None
    return progress.epochs, lambda rows: _outputs(trainer.predict(rows))  # type: ignore[arg-type]


def _outputs(prediction: EvalPrediction | Any) -> Outputs:
    """The Trainer hands over one array, or a tuple where the model returns several."""
    found = prediction.predictions
    return tuple(map(np.asarray, found)) if isinstance(found, tuple) else (np.asarray(found),)


def _arguments(recipe: Recipe, scratch: str, num_train: int) -> TrainingArguments:
    steps = -(-num_train // recipe.batch_size) * recipe.epochs
    warmup_steps = min(recipe.warmup_steps, steps // 2)
    if warmup_steps < recipe.warmup_steps:
        print(f"warm-up takes {warmup_steps} steps, half of all, instead of {recipe.warmup_steps}", flush=True)
    arguments = TrainingArguments(
        output_dir=scratch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip_grad,
        optim="adamw_torch",
        **ADAM,  # type: ignore[arg-type]
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=recipe.device != "cpu" and torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the GPUs it sees
    return arguments


class _Progress(TrainerCallback):
    """Prints a line per logged step and per epoch; keeps every epoch's scores in `epochs`."""

    def __init__(self, score_names: tuple[str, ...]) -> None:
        self.score_names = score_names
        self.epochs: list[dict[str, float]] = []
        self.start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        left = (time.monotonic() - self.start) / state.global_step * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step}/{state.max_steps} | loss {float(logs['loss']):.4f} | "
            f"learning rate {float(logs['learning_rate']):.2e} | {timedelta(seconds=round(left))} left",
            flush=True,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None:
            return
        scores = {name: float(metrics[f"eval_{name}"]) for name in self.score_names}
        self.epochs.append(scores)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"epoch {len(self.epochs)}/{int(args.num_train_epochs)}: validation {figures}", flush=True)


def _write(
    output: Path,
    model: PreTrainedModel,
    tokenizer_folder: Path,
    result: dict[str, Any],
    predictions: dict[str, list[dict[str, Any]]],
) -> None:
    """The lines of every set that was predicted, by its name; that of the validation is empty."""
    with whole_folder(output, OUTPUT_FILES) as folder:
        write_model(model, tokenizer_folder, folder)
        for name, lines in predictions.items():
            path = folder / (f"predictions_{name}.jsonl" if name else "predictions.jsonl")
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
