"""What is said while the Trainer trains."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Prints a line per logged step and per epoch; keeps every epoch's scores in `epochs`."""

    def __init__(self, score_names: Sequence[str], has_loss: bool = True) -> None:
        self.score_names = [*score_names, *(["loss"] if has_loss else [])]
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0
        """Of training, without evaluation."""
        self.start = self.epoch_start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch_start = time.monotonic()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.monotonic() - self.epoch_start

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
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
        if not state.is_world_process_zero:
            return
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"epoch {len(self.epochs)}/{int(args.num_train_epochs)}: validation {figures}", flush=True)
