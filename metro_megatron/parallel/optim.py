"""The optimizer over both homes: schedule, loss scale, one clipping norm, and what to do about bad gradients.

Main and what both phases train have one Adam; what the auxiliary alone has may have another, and the matrices of either
Muon: groups of parameters whose rates are shares of one schedule.

The host decides none of it. Norm, clipping, and whether to update at all are numbers on the device that the update
itself reads, so that the next step is launched while this one runs; what happened is read afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from metro_megatron import mcore
from metro_megatron.config.schema import Config, OptimizerConfig
from metro_megatron.parallel.adam import adam_step
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.loss_scale import LossScale
from metro_megatron.parallel.muon import Matrix, Muon, matrices_of


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    learning_rate: float
    grad_norm: float
    """Global norm before clipping; a step was skipped where it is not finite, or a spike."""
    shared_grad_norm: float
    stage_grad_norm: float
    loss_scale: float
    is_skipped: bool
    stops: bool
    """Whether any rank had been asked to stop."""


class PendingUpdate:
    """An update whose figures are still on their way to the host."""

    def __init__(self, learning_rate: float, figures: Tensor):
        """figures [6] FP64: the numbers of an Update behind its rate."""
        self.learning_rate = learning_rate
        # From a GPU this fills page-locked memory once the device gets there.
        self.figures = figures.to("cpu", non_blocking=True)
        self.is_there = torch.cuda.Event()
        self.is_there.record()

    def read(self) -> Update:
        """Wait for the step, as far as it has not been done."""
        self.is_there.synchronize()
        total, shared, stage, scale, is_skipped, stops = self.figures.tolist()
        return Update(self.learning_rate, total, shared, stage, scale, bool(is_skipped), bool(stops))


OWN_SCHEDULE = "own_schedule"
"""Marks the groups of parameters whose rates follow optimizer.auxiliary_lr_schedule."""


def learning_rate(step: int, options: OptimizerConfig, train_steps: int) -> float:
    """Rate of 0-based step: linear from lr / warm-up to lr, then towards 0 at train_steps."""
    return options.learning_rate(train_steps).at(step, train_steps)


class Optimizer:
    """Adam and Muon with decoupled weight decay; their state is sharded over the replicas of each home."""

    def __init__(self, config: Config, homes: Homes):
        self.options = config.optimizer
        self.train_steps = config.train.train_steps
        self.lr_factor = config.lr_factor
        self.auxiliary_schedule = self.options.auxiliary_schedule
        self.homes = homes
        precision, layout, main = config.train.precision, homes.layout, self.options
        auxiliary = homes.only_in_phase_1 if config.corruption.trains_auxiliary else []
        shared_matrices, shared_groups = _own_groups("auxiliary", auxiliary, main.auxiliary, main, layout.tensor)
        stage_matrices, stage_groups = _own_groups("main", homes.stage, main, main, layout.tensor)
        self.shared = mcore.distributed_optimizer(
            list(homes.shared.values()), main, precision, layout.shared_groups, shared_groups
        )
        self.stage = mcore.distributed_optimizer(homes.stage, main, precision, layout.stage_groups, stage_groups)
        self.both = (self.shared, self.stage)
        self.muons = (
            Muon(self.shared, shared_matrices, layout.tensor),
            Muon(self.stage, stage_matrices, layout.tensor),
        )
        self.adam_step = adam_step(main.adam_impl)
        self.chained = ChainedOptimizer(list(self.both))
        self.loss_scale: LossScale | None = None
        if precision == "fp16":
            # megatron-core gives each home its own, which would drift apart when only one overflows.
            self.loss_scale = LossScale.like(self.shared.grad_scaler)
            self.shared.grad_scaler = self.stage.grad_scaler = self.loss_scale
        homes.stage[0].config.grad_scale_func = self.scale_loss  # the schedule's; phase 1 calls it itself

    @torch.no_grad()
    def set_masters(self, values: Iterable[tuple[torch.nn.Parameter, Tensor]]) -> None:
        """Give parameters in 16 bits the FP32 values that they were rounded from; those in FP32 are their own."""
        masters = {
            parameter: (one, master)
            for one in self.both
            for parameters, shards in zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True)
            for parameter, master in zip(parameters, shards, strict=True)
        }
        for parameter, value in values:
            if parameter in masters:
                one, master = masters[parameter]
                own = one._get_model_param_range_map(parameter)["param"]
                master.copy_(value.reshape(-1)[own.start : own.end])

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times fp16's loss scale; the loss itself in other precisions."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    @torch.no_grad()
    def step(self, step: int, stops: bool = False, limit: float = math.inf) -> PendingUpdate:
        """Clip by the norm over both homes and update; skip when a gradient is not finite, or the norm above `limit`.

        A skipped step leaves parameters and moments as they are. stops: whether this rank has been asked to, which
        every rank learns from the update. A collective call.
        """
        phase = self.lr_factor.at(step, self.train_steps)
        rate = phase * learning_rate(step, self.options, self.train_steps)
        own = self.auxiliary_schedule
        own_rate = phase * self.options.lr * own.at(step, self.train_steps) if own else rate
        for group in self.chained.param_groups:
            group["lr"] = (own_rate if group.get(OWN_SCHEDULE) else rate) * group["lr_mult"]
            # megatron-core marks what is decayed and leaves the product to a scheduler that we do not use.
            group["weight_decay"] = self.options.weight_decay * group["wd_mult"]
        for one in self.both:
            one._copy_model_grads_to_main_grads()
        scale = self.chained.get_loss_scale().double().squeeze()
        # The homes share no parameter, so that their squares add up.
        squares = [_sum_of_squares(one, scale) for one in self.both]
        sums = torch.stack([*squares, torch.full_like(scale, stops)])
        dist.all_reduce(sums, group=self.homes.layout.world)
        norms = torch.cat([sums[:2].sum(0, keepdim=True), sums[:2]]).sqrt() / scale
        is_overflow = ~norms[0].isfinite()
        is_skipped = is_overflow | (norms[0] > limit)
        factor = torch.ones_like(scale)
        if self.options.clip_grad > 0.0:
            factor = (self.options.clip_grad / (norms[0] + 1e-6)).clamp(max=1.0)
        self._update(is_skipped.float(), (scale / factor).float())
        if self.loss_scale is not None:
            self.loss_scale.update(is_overflow)
        return PendingUpdate(rate, torch.cat([norms, torch.stack([scale, is_skipped, sums[2]])]))

    def _update(self, is_skipped: Tensor, divisor: Tensor) -> None:
        """From gradients over `divisor`, unless is_skipped is 1; then every rank gets what changed."""
        for one, muon in zip(self.both, self.muons, strict=True):
            muon.step(divisor, is_skipped)
            adam = one.optimizer
            # What torch's fused kernel reads for torch.amp, too: kernels divide, or do nothing, on the way.
            adam.grad_scale, adam.found_inf = divisor, is_skipped
            groups = adam.param_groups
            adam.param_groups = [group for group in groups if "momentum" not in group]  # the others are Muon's
            self.adam_step(adam)
            adam.param_groups = groups
            masters, weights = (
                [shard for group in groups for shard in group]
                for groups in (one.shard_fp32_from_float16_groups, one.shard_float16_groups)
            )
            if masters:  # in fp32 the weights themselves are updated
                torch._foreach_copy_(weights, masters)
        self.homes.end_step()


def _own_groups(
    name: str,
    ddps: list[DistributedDataParallel],
    options: OptimizerConfig,
    of_all: OptimizerConfig,
    tensor: ProcessGroup,
) -> tuple[list[Matrix], list[mcore.OwnGroup]]:
    """A model's matrices that are Muon's, and its parameters whose options are not those of all."""
    matrices = matrices_of(ddps, tensor) if options.matrices == "muon" else []
    weights = {matrix.weight for matrix in matrices}
    others = {weight for ddp in ddps for weight in ddp.parameters()} - weights
    groups = []
    schedule = {OWN_SCHEDULE: True} if options is not of_all and of_all.auxiliary_schedule else {}
    if weights:
        muon = {"lr_mult": (options.muon_lr or options.lr) / of_all.lr, "momentum": options.muon_momentum}
        groups.append(mcore.OwnGroup(f"{name} matrices", weights, {**muon, **schedule}))
    betas = (options.adam_beta1, options.adam_beta2)
    if schedule or options.lr != of_all.lr or betas != (of_all.adam_beta1, of_all.adam_beta2):
        adam = {"lr_mult": options.lr / of_all.lr, "betas": betas}
        groups.append(mcore.OwnGroup(name, others, {**adam, **schedule}))
    return matrices, groups


def _sum_of_squares(optimizer: DistributedOptimizer, like: Tensor) -> Tensor:
    """Of one home's gradients on this rank, in FP64; a parameter that tensor-parallel ranks replicate counts once.

    A float32 sum of a large gradient depends on how it is split.
    """
    grads = optimizer.get_main_grads_for_grad_norm()
    if not grads:
        return torch.zeros_like(like)
    return torch.stack(torch._foreach_norm(grads, dtype=torch.float64)).square().sum()  # type: ignore[arg-type]
