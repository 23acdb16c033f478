"""Adam's update by another library's kernel: torch's state and options, so that a checkpoint is of no kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import AdamW

from metro_megatron.nvidia import AdamKernel, adam_kernel

CHUNK = 2048 * 32
"""Elements that a block of threads updates: what both libraries' own optimizers give their kernel."""
WITH_DECOUPLED_DECAY, WITH_BIAS_CORRECTION = 1, 1


def adam_step(implementation: str) -> Callable[[AdamW], object]:
    """What computes an update from gradients over adam.grad_scale, unless adam.found_inf is 1: optimizer.adam_impl's.

    It waits for nothing on the device.
    """
    kernel = adam_kernel(implementation)
    return AdamW.step if kernel is None else partial(_step, kernel)


@torch.no_grad()
def _step(kernel: AdamKernel, adam: AdamW) -> None:
    scale: Tensor = adam.grad_scale  # type: ignore[attr-defined]
    skips: Tensor = adam.found_inf  # type: ignore[attr-defined]
    for group in adam.param_groups:
        tensors: list[list[Tensor]] = [[] for _ in range(6)]
        adam._init_group(group, *tensors)
        parameters, gradients, means, squares, _, steps = tensors
        if not parameters:
            continue
        torch._foreach_add_(steps, 1 - skips)
        kernel(
            CHUNK,
            skips.int().view(1),
            [gradients, parameters, means, squares],
            torch.full_like(scale, group["lr"]).view(1),
            *group["betas"],
            group["eps"],
            steps[0].int().view(1),
            WITH_DECOUPLED_DECAY,
            WITH_BIAS_CORRECTION,
            group["weight_decay"],
            scale.reciprocal().view(1),
        )
