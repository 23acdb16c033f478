"""Lower learning rates for what is nearer to the input (ELECTRA)."""

import re

import torch
from torch import nn


def layer_rates(encoder: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Factors of the learning rate of an encoder's parameters, ELECTRA's: decay^(n + 1 - l) in layer l of n, from 0.

    Embeddings, and what else of the encoder is of no layer, get decay^(n + 2); heads, and a pooler, are not among them.
    The layer is the first number in a parameter's name.
    """
    layers = {
        parameter: re.search(r"(?:^|\.)(\d+)\.", name)
        for name, parameter in encoder.named_parameters()
        if not name.startswith("pooler.")
    }
    numbers = {parameter: int(found[1]) if found else -1 for parameter, found in layers.items()}
    top = max(numbers.values())
    return {parameter: decay ** (top + 2 - number) for parameter, number in numbers.items()}


def scale_rates(optimizer: torch.optim.Optimizer, factors: dict[nn.Parameter, float]) -> None:
    """Split the groups of an optimizer that has made no step by the factors of their rates; the highest is first."""
    optimizer.param_groups = [
        {**group, "params": members, "lr": group["lr"] * factor}
        for factor in sorted({1.0, *factors.values()}, reverse=True)
        for group in optimizer.param_groups
        if (members := [one for one in group["params"] if factors.get(one, 1.0) == factor])
    ]
