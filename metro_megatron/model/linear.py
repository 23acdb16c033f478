"""The linear layers of an encoder: megatron-core's, as torch's own where nothing is split, and Transformer Engine's."""

from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Module, functional


class ColumnLinear(ColumnParallelLinear):
    """Split over its outputs; on one tensor-parallel rank one product with its bias, in place of product and sum."""

    def forward(self, input_: Tensor, *given: object) -> tuple[Tensor, Tensor | None]:
        """[..., H] to [..., this rank's outputs]; the second is a bias that was left out."""
        if self.tp_group.size() > 1:
            return super().forward(input_, *given)
        return functional.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Split over its inputs; its bias is left to the norm behind it."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., this rank's inputs] to [..., H], and the bias."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return functional.linear(input_, self.weight), self.bias


TRANSFORMER_ENGINE: tuple[type[Module], ...] = ()
"""Transformer Engine's, split over outputs and over inputs; none where it is not installed.

Parameters, their marks and their parts of a checkpoint are those of the two above.
"""
if transformer_engine.HAVE_TE:
    TRANSFORMER_ENGINE = (transformer_engine.TEColumnParallelLinear, transformer_engine.TERowParallelLinear)
