"""A task as a model reads it, and what is said of the model's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.finetune.models import read_config, read_tokenizer
from metro_megatron.finetune.others import Asked
from metro_megatron.finetune.packing import refuse_packing
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.task import Encoded, Outputs, Task


@dataclass(frozen=True)
class Lesson:
    """A task, and its examples as rows of a model's ids."""

    task: Task[Any]
    config: PreTrainedConfig
    """The model's, with the task's settings."""
    tokenizer: PreTrainedTokenizerFast
    tokenizer_folder: Path
    train: Encoded
    validation: Encoded

    @classmethod
    def read(cls, task: Task[Any], model_folder: Path, recipe: Recipe) -> Lesson:
        """Of the model in a folder. Raises UserError for labels that nothing can learn, or a folder without a model."""
        settings, *_ = [one.settings() for one in (task, *task.others.values())]
        config = read_config(model_folder, settings)
        refuse_packing(recipe, config)
        tokenizer_folder = Path(recipe.tokenizer) if recipe.tokenizer else model_folder
        tokenizer = read_tokenizer(tokenizer_folder, config, recipe.max_length)
        if not recipe.max_length:
            tokenizer.model_max_length = min(tokenizer.model_max_length, task.longest_row)
        train, validation = (task.encode(tokenizer, examples) for examples in (task.train, task.validation))
        return cls(task, config, tokenizer, tokenizer_folder, train, validation)

    @property
    def name(self) -> str:
        """The benchmark's, or that of the kind of task."""
        return self.task.benchmark or self.task.name

    def announce(self) -> None:
        """Say what was read."""
        task = self.task
        if is_first_process():
            print(
                f"{len(task.train)} training and {len(task.validation)} validation {task.unit}, "
                f"{task.describe_labels()}; {self.train.num_cut} and {self.validation.num_cut} "
                f"{task.cut.format(length=self.tokenizer.model_max_length)}",
                flush=True,
            )

    def facts(self, scores: Mapping[str, float], outputs: Outputs, asked: Mapping[str, Asked]) -> dict[str, Any]:
        """For metrics.json: scores on validation, for which the model has given outputs, and on what else was asked."""
        others = {f"{key}_{name}": score for name, one in asked.items() for key, score in one.scores.items()}
        return {
            "task": self.name,
            **scores,
            **others,
            "score_names": [*self.task.score_names, *others],
            **self.task.facts(),
            "remarks": [*_diverged(scores, outputs), *self.task.remarks(outputs, self.validation.rows)],
            "num_train": len(self.task.train),
            "num_validation": len(self.task.validation),
            "num_cut": self.train.num_cut + self.validation.num_cut,
        }

    def predictions(self, outputs: Outputs, asked: Mapping[str, Asked]) -> dict[str, list[dict[str, Any]]]:
        """Lines by the name of their file, of validation and of what else was asked."""
        return {
            "predictions.jsonl": self.task.predictions(outputs, self.validation.rows),
            **{f"predictions_{name}.jsonl": one.predictions for name, one in asked.items()},
        }


def _diverged(scores: Mapping[str, float], outputs: Outputs) -> list[str]:
    """What must be known of scores on answers that are no numbers, of which the first class would be the largest."""
    if all(map(math.isfinite, scores.values())) and not any(np.isnan(output).any() for output in outputs):
        return []
    return [
        "the loss of validation, or what the model answers, is no finite number: its scores mean nothing; try a lower "
        "--learning_rate, and smaller labels if they are numbers"
    ]
