"""LayerNorm for megatron-core's norm slots, whose own one refuses sequence parallelism, and the sum inside it."""

import copy

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fused.layer_norm import RowDropout, drop_rows, layer_norm


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last dimension, FP32 inside.

    Under sequence parallelism each rank sees its own part of the positions, so the gradients of weight and
    bias are partial sums: the mark has megatron-core add them up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, device=device))
        self.eps = eps
        mark_sequence_parallel(self, config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x_bias: Tensor | None = None,
        dropout: RowDropout | None = None,
    ) -> Tensor:
        """LN(residual + dropout(x + x_bias)), any part absent."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual, x_bias=x_bias, dropout=dropout)


def add_dropped(x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout: RowDropout | None) -> Tensor:
    """residual + dropout(x + x_bias), what LayerNorm is taken of in post-LN; plain torch, FP32 inside."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if x_bias is not None:
        z = z + x_bias
    if dropout is not None:
        z = drop_rows(z, dropout)
    return (z + residual).to(residual.dtype)


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Say that this module's gradients are partial sums over the tensor-parallel ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def outside_layers(config: TransformerConfig) -> TransformerConfig:
    """For what stands before or behind the layers: positions are whole there, and weight gradients torch's affair."""
    config = copy.copy(config)
    config.sequence_parallel = False
    config.gradient_accumulation_fusion = False
    return config
