"""One Adam over both homes: schedule, loss scale, one clipping norm, and what to do about bad gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from metro_megatron import mcore
from metro_megatron.config.schema import Config, OptimizerConfig
from metro_megatron.parallel.homes import Homes


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    learning_rate: float
    grad_norm: float
    """Global norm before clipping; not finite when the step was skipped for it."""
    shared_grad_norm: float
    stage_grad_norm: float
    loss_scale: float
    is_skipped: bool


def learning_rate(step: int, options: OptimizerConfig, train_steps: int) -> float:
    """Rate of 0-based step: linear from lr / warm-up to lr, then linear towards 0 at train_steps."""
    return options.learning_rate(train_steps).at(step, train_steps)


class Optimizer:
    """Adam with decoupled weight decay; its state is sharded over the replicas of each home."""

    def __init__(self, config: Config, homes: Homes):
        self.options = config.optimizer
        self.train_steps = config.train.train_steps
        precision = config.train.precision
        layout = homes.layout
        self.shared = mcore.distributed_optimizer(
            list(homes.shared.values()), self.options, precision, layout.shared_groups
        )
        self.stage = mcore.distributed_optimizer(homes.stage, self.options, precision, layout.stage_groups)
        self.chained = ChainedOptimizer([self.shared, self.stage])
        self.scaler = _SharedScaler.adopt(self.chained) if precision == "fp16" else None
        homes.stage[0].config.grad_scale_func = self.scale_loss  # the schedule's; phase 1 calls it itself

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times fp16's loss scale; the loss itself in other precisions."""
        return loss if self.scaler is None else loss * self.chained.get_loss_scale()

    @torch.no_grad()
    def step(self, step: int) -> Update:
        """Clip by the norm over both homes and update; skip when a gradient is not finite.

        A skipped step leaves parameters and moments as they are.
        """
        rate = learning_rate(step, self.options, self.train_steps)
        for group in self.chained.param_groups:
            group["lr"] = rate
            # megatron-core marks what is decayed and leaves the product to a scheduler that we do not use.
            group["weight_decay"] = self.options.weight_decay * group["wd_mult"]
        # Before prepare_grads, which may lower it for the next step.
        scale = float(self.chained.get_loss_scale())
        has_overflow = self.chained.prepare_grads()
        if self.scaler is not None:
            self.scaler.commit(has_overflow)
        # The homes share no parameter, so that their squares add up.
        norms = [_norm(optimizer) for optimizer in (self.shared, self.stage)]
        total = math.hypot(*norms)
        is_skipped = has_overflow or not math.isfinite(total)
        if not is_skipped:
            if self.options.clip_grad > 0.0:
                for optimizer in (self.shared, self.stage):
                    parameters = optimizer.get_parameters()
                    if parameters:
                        clip_grad_by_total_norm_fp32(parameters, self.options.clip_grad, total)
            self.chained.step_with_ready_grads()
        return Update(rate, total, norms[0], norms[1], scale, is_skipped)


def _norm(optimizer) -> float:
    """L2 norm of one home's gradients, each parameter counted once over all ranks."""
    grads = optimizer.get_main_grads_for_grad_norm()
    norm = get_grad_norm_fp32(grads, grad_stats_parallel_group=optimizer.get_grad_stats_parallel_group())
    return float(norm)


class _SharedScaler:
    """One dynamic loss scale for both homes.

    megatron-core gives each optimizer its own, which would drift apart when only one home overflows.
    """

    def __init__(self, scaler):
        self.scaler = scaler
        self.commit: Callable[[bool], None] = scaler.update

    @classmethod
    def adopt(cls, chained: ChainedOptimizer) -> _SharedScaler:
        scaler = chained.chained_optimizers[0].grad_scaler
        shared = cls(scaler)
        scaler.update = lambda found_inf: None  # each home's own call; `commit` decides once for both
        for optimizer in chained.chained_optimizers:
            optimizer.grad_scaler = scaler
        return shared
