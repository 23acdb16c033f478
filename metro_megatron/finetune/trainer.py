"""transformers' Trainer with what a recipe may add to it: METRO's optimizer, class weights, PDR, rates by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedConfig, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from metro_megatron.cli.command_line import is_first_process
from metro_megatron.errors import UserError
from metro_megatron.finetune.models import Head
from metro_megatron.finetune.packing import pack_rows
from metro_megatron.finetune.pdr import Regularizer
from metro_megatron.finetune.rates import layer_rates, scale_rates
from metro_megatron.finetune.recipe import BALANCED, Recipe, num_processes
from metro_megatron.finetune.task import Outputs, Row

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}


class RecipeTrainer(Trainer):
    """Its loss is the model's, or the cross-entropy with class_weights [C], plus PDR; evaluation shows the model's.

    Of a step that is computed in parts, by accumulation or by several processes, it is the mean over all texts (or
    tokens) of the step, whatever the parts have of them; of a regression, and of spans, the mean of the parts' means.
    """

    model: Any  # a PreTrainedModel, or what a subclass makes of several
    train_dataset: Any

    def __init__(self, recipe: Recipe, class_weights: Tensor | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        if recipe.patience:
            self.add_callback(EarlyStoppingCallback(recipe.patience))
        self.recipe = recipe
        self.class_weights = None if class_weights is None else class_weights.to(self.args.device)
        self.regularizer = (
            None if recipe.pdr == "none" else Regularizer(recipe.pdr, recipe.pdr_radius, recipe.pdr_noise)
        )
        # Has the Trainer count the labels of a step, unless a number might be taken for a missing one.
        self.model_accepts_loss_kwargs = all(config.problem_type != "regression" for config in self.configs())
        self.num_forwards = 0
        if recipe.batching == "packed":
            pack_rows(self.encoder)

    def configs(self) -> list[PreTrainedConfig]:
        """Of all models that are trained."""
        return [self.model.config]

    def config_of(self, inputs: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration of the model that reads inputs."""
        return self.model.config

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a part of the step, so scaled that the parts add up where the step's labels were counted."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            loss = self._training_loss(model, inputs, outputs)
            self.num_forwards += 1 if self.regularizer is None else 2
            if num_items_in_batch is not None:
                share = inputs["labels"].ne(-100).sum() / num_items_in_batch
                loss = loss * (share * self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def _training_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Mapping[str, Tensor]) -> Tensor:
        loss = outputs["loss"]
        if self.class_weights is not None:
            logits = outputs["logits"].flatten(0, -2).float()
            loss = functional.cross_entropy(logits, inputs["labels"].flatten(), self.class_weights)
        if self.regularizer is not None:
            noised = self.regularizer.noised(model, inputs, self.model.get_input_embeddings())
            divergence = self.regularizer(outputs, noised, inputs.get("labels"), self.config_of(inputs))
            loss = loss + self.recipe.pdr_weight * divergence
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.recipe.layer_decay != 1:
            scale_rates(optimizer, layer_rates(self.encoder, self.recipe.layer_decay))
        return optimizer

    def outputs(self, rows: Sequence[Row]) -> Outputs:
        """The model's for rows, in their order."""
        by_length = ByLength(rows)
        return by_length.outputs(self.predict(by_length.rows))  # type: ignore[arg-type]

    def cost(self, seconds: float) -> dict[str, float]:
        """What training took: seconds in epochs, steps, forwards of one process, and rows a second of all."""
        num_rows = len(self.train_dataset) * self.state.epoch
        return {
            "seconds": seconds,
            "steps": self.state.global_step,
            "forwards": self.num_forwards,
            "rows_per_second": num_rows / seconds,
        }

    @property
    def encoder(self) -> nn.Module:
        """What the heads stand on."""
        return self.model.base_model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.recipe.batching != "length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        # All processes must draw the same: a generator of its own, not torch's, from which dropout draws, too.
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(self.recipe.batch_size, lengths=row_lengths(rows), generator=generator)


class ByLength:
    """Rows to be evaluated, those of like length beside each other, which is quick."""

    def __init__(self, rows: Sequence[Row]):
        self._order = np.argsort(row_lengths(rows), kind="stable")
        self.rows = [rows[i] for i in self._order]

    def outputs(self, prediction: Any) -> Outputs:
        """What an EvalPrediction, or PredictionOutput, of `rows` holds, in the order in which they were given."""
        found = prediction.predictions
        # The Trainer hands over one array, or a tuple where the model returns several.
        arrays = found if isinstance(found, tuple) else (found,)
        return tuple(np.asarray(one)[np.argsort(self._order)] for one in arrays)


def row_lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens of every row; of a row of candidates, those of the longest."""
    return [
        max(map(len, row["input_ids"])) if isinstance(row["input_ids"][0], Sized) else len(row["input_ids"])
        for row in rows
    ]


def class_weights(recipe: Recipe, head: Head, rows: Sequence[Row], config: PreTrainedConfig) -> Tensor | None:
    """Weights [C] of the classes that rows have as "label", or tokens as "labels"; None if the recipe has none.

    Balanced: all rows over classes times rows of the class, as scikit-learn has it; 1 for a class without rows.
    Raises UserError as `refuse_class_weights`.
    """
    refuse_class_weights(recipe, head, config)
    if not recipe.class_weights:
        return None
    given: list[Any] = [row.get("label", row.get("labels", ())) for row in rows]
    labels = [label for one in given for label in np.ravel(one).tolist() if label != -100]
    weights = np.ones(len(config.id2label or {}))
    if recipe.class_weights == BALANCED:
        classes = np.unique(labels)
        weights[classes] = compute_class_weight("balanced", classes=classes, y=labels)
    else:
        weights[:] = [float(weight) for weight in recipe.class_weights]
    return torch.tensor(weights, dtype=torch.float32)


def refuse_class_weights(recipe: Recipe, head: Head, config: PreTrainedConfig) -> None:
    """Raise UserError for weights of a task without classes, or of another number of classes."""
    has_classes = head in ("sequence_classification", "token_classification")
    names = config.id2label or {}
    if not recipe.class_weights:
        return
    if not has_classes or config.problem_type in ("regression", "multi_label_classification"):
        raise UserError("class_weights is given, but every text of this task has not one of several classes; leave it")
    if recipe.class_weights != BALANCED and len(recipe.class_weights) != len(names):
        raise UserError(
            f"class_weights has {len(recipe.class_weights)} numbers, but there are {len(names)} classes; give one for "
            f"each of {', '.join(map(str, names.values()))}"
        )


def training_arguments(recipe: Recipe, scratch: str, num_train: int, best: str = "") -> TrainingArguments:
    """The Trainer's arguments for num_train rows; `best` is the score by which an epoch is kept or the last one."""
    steps = -(-num_train // recipe.batch_size) * recipe.epochs
    warmup_steps = min(recipe.warmup_steps, steps // 2)
    if warmup_steps < recipe.warmup_steps and is_first_process():
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
        per_device_train_batch_size=recipe.batch_size // num_processes() // recipe.gradient_accumulation_steps,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        num_train_epochs=recipe.epochs,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=recipe.device != "cpu" and torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="epoch" if recipe.keep_best else "no",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=recipe.keep_best,
        metric_for_best_model=f"eval_{best}" if recipe.keep_best or recipe.patience else None,
        greater_is_better=True,
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the GPUs it sees
    return arguments
