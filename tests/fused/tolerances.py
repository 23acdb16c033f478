"""How far a kernel may be from its reference in float64, by the type its tensors are stored in."""

import torch
from torch import Tensor

TOLERANCES = {
    # Only references compute in it, and are compared with others that add in another order.
    torch.float64: (1e-12, 1e-12),
    # Sums of up to some thousand products, each rounded to 2^-24.
    torch.float32: (1e-5, 1e-5),
    # Results are rounded to 2^-11; backward reads a rounded sum or probability, and sums over rows add those errors up.
    torch.float16: (2e-3, 2e-3),
    # As above with 2^-8.
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
"""Type: (atol, rtol); atol is a part of the largest wanted value, or of 1 where that is less."""


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Compare with wanted, in float64 whatever its type; dtype is what the kernel's tensors were stored in."""
    atol, rtol = TOLERANCES[dtype]
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted.double(), atol=atol * scale, rtol=rtol)
