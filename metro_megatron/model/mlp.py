"""The MLP of a layer on megatron-core's module, of which backward may make parts again."""

from collections.abc import Callable

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from metro_megatron.model.recompute import remade, same


def feed_forward(mlp: MLP, hidden: Tensor, norm: Callable[[Tensor], Tensor] = same) -> tuple[Tensor, Tensor | None]:
    """[S, B, H] to the same and the bias of the last linear layer, which is not yet added; norm: pre-LN's."""

    def inner(hidden: Tensor) -> Tensor:
        made, bias = mlp.linear_fc1(norm(hidden))
        return mlp.activation_func(made if bias is None else made + bias)

    if "mlp" in mlp.config.recompute_modules:
        return remade(mlp.config, "mlp", inner, mlp.linear_fc2, hidden)
    made, bias = remade(mlp.config, "layernorm", norm, mlp.linear_fc1, hidden)
    return remade(mlp.config, "mlp_act", mlp.activation_func, mlp.linear_fc2, made if bias is None else made + bias)
