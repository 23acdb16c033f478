"""LayerNorm with FP32 statistics and FP32 affine map, in the precision of its input outside."""

from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension of x [..., H] with weight and bias [H]; returns x's dtype."""
    y = functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return y.to(x.dtype)
