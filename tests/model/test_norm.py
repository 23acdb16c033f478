"""The sum that post-LN hides in its norm, and pre-LN keeps."""

import pytest
import torch

from fused.layer_norm import RowDropout, layer_norm
from metro_megatron.model.norm import add_dropped


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_is_that_inside_the_norm(rate: float, dtype: torch.dtype) -> None:
    """Values, the mask, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 3, 16), (5, 3, 16), (16,))
    given = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    weight, bias = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    dropout = RowDropout(rate, torch.tensor([7]), torch.arange(15)) if rate else None
    x, residual, x_bias = given
    summed = add_dropped(x, residual, x_bias, dropout)
    assert summed.dtype == dtype
    inside = layer_norm(x, weight, bias, 1e-5, residual=residual, x_bias=x_bias, dropout=dropout)
    outside = layer_norm(summed, weight, bias, 1e-5)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5  # the sum is rounded to 8 bits once more
    torch.testing.assert_close(outside, inside, atol=tolerance, rtol=tolerance)
    gradients = (torch.autograd.grad(value.square().sum() + value.sin().sum(), given) for value in (outside, inside))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=4 * tolerance, rtol=4 * tolerance)
    if dropout is not None:
        is_dropped = (summed == residual).double().mean()
        assert is_dropped == pytest.approx(rate, abs=0.1)
