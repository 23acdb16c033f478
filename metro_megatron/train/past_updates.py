"""What the last steps did to the weights: read one step late, while a GPU works at the next, and judged."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.parallel.optim import PendingUpdate, Update
from metro_megatron.train.spikes import NormHistory

MAX_SKIPPED = 50
"""Steps skipped in a row for gradients that are not finite, after which a run stops."""


class BadStep(Exception):
    """A step, counted from 1, that a run shall go back from; `cause` says what is bad about it."""

    def __init__(self, step: int, cause: str):
        super().__init__(f"step {step}: {cause}")
        self.step = step
        self.cause = cause


class PastUpdates:
    """Updates in the order of their steps. All ranks read the same, and so come to the same judgement."""

    def __init__(self, config: Config, on_update: Callable[[int, Update], object]):
        """on_update hears of every update that is read, with its step counted from 1."""
        self.options = config.optimizer
        self.policy = config.train.bad_steps
        self.train_steps = config.train.train_steps
        self.is_fp16 = config.train.precision == "fp16"
        self.on_update = on_update
        self.skipped = 0
        """Steps of the whole run that were skipped."""
        self.skipped_in_a_row = 0
        self.norms = NormHistory(config.optimizer.skip_spikes)
        self._pending: deque[tuple[int, PendingUpdate]] = deque()

    def add(self, step: int, update: PendingUpdate) -> None:
        """An update has been launched; step is counted from 1."""
        self._pending.append((step, update))

    def read(self, keep: int = 0) -> list[Update]:
        """Wait for all updates but the `keep` last ones.

        Raises BadStep or UserError, on every rank, for a step after which train.bad_steps lets a run not go on.
        """
        updates = []
        while len(self._pending) > keep:
            step, pending = self._pending.popleft()
            updates.append(pending.read())
            self.on_update(step, updates[-1])
            self.norms.add(step - 1, updates[-1].grad_norm)
            self._judge(updates[-1], step)
        return updates

    def state(self) -> dict[str, Any]:
        """For a checkpoint; nothing is pending."""
        return {"skipped_steps": self.skipped, **({"norms": self.norms.state()} if self.norms.threshold else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.skipped = state["skipped_steps"]
        self.norms.load_state(state.get("norms", {}))

    def _judge(self, update: Update, step: int) -> None:
        is_spike = update.is_skipped and math.isfinite(update.grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.is_skipped and not is_spike else 0
        self.skipped += update.is_skipped
        # In fp16 a loss scale is found by steps that are not finite.
        looks_for_scale = self.is_fp16 and not is_spike and update.loss_scale > self.options.min_loss_scale
        if update.is_skipped and not looks_for_scale and self.policy != "skip":
            self._end_or_go_back(step, f"gradient norm {update.grad_norm:.3g} is {'a spike' if is_spike else 'bad'}")
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{MAX_SKIPPED} steps in a row had gradients that are not finite (the last one is step {step}): "
                "go on from the last checkpoint with a lower optimizer.lr or optimizer.clip_grad, or with "
                "train.precision bf16, named in train.override, or pass over such steps with train.skip_steps"
            )

    def _end_or_go_back(self, step: int, cause: str) -> None:
        if self.policy == "stop":
            raise UserError(
                f"step {step}: {cause}, and train.bad_steps is stop: go on from the last checkpoint with other "
                f"options, named in train.override, or with train.skip_steps {step}"
            )
        if step < self.train_steps:  # behind the last one there is nothing to go on with: it is skipped
            raise BadStep(step, cause)
