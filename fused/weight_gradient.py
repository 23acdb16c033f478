"""The gradient of a matrix, added to a sum in FP32.

Legend: T tokens, I inputs and O outputs of a linear layer.
"""

import torch
from torch import Tensor


def add_weight_gradient(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
    """total [O, I] += gradient [T, O]^T inputs [T, I], in place; total is FP32, no product is rounded to 16 bits."""
    if total.is_cuda and inputs.dtype != total.dtype:
        # aten::addmm.dtype_out, in place, would spare a pass over total's size; not tried on a GPU.
        total += torch.mm(gradient.t(), inputs, out_dtype=total.dtype)
    else:
        total += torch.mm(gradient.t().to(total.dtype), inputs.to(total.dtype))
