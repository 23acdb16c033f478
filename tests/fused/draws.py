"""Random tensors of the tests: the CPU's numbers on every device, so that a GPU is tested with those that passed."""

import torch
from torch import Tensor


class Draws:
    """A sequence that begins with the seed; tensors on the default device, which is the kernels'."""

    def __init__(self, seed: int):
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, FP32."""
        return torch.randn(shape, generator=self.generator, device="cpu").to(torch.get_default_device())

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), FP32."""
        return torch.rand(shape, generator=self.generator, device="cpu").to(torch.get_default_device())

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In [low, high), int64."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device="cpu")
        return drawn.to(torch.get_default_device())


def arriving(shape: torch.Size) -> Tensor:
    """A gradient that is exact in every type: eighths in [-1, 1]."""
    return Draws(1).integers(-8, 9, *shape) / 8
