"""The post-LN transformer layer of BERT and METRO from megatron-core's parts."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from metro_megatron.model.attention import RelativeAttention
from metro_megatron.model.norm import LayerNorm


class PostNormLayer(TransformerLayer):
    """x <- LN(x + drop(attention(x))), then x <- LN(x + drop(mlp(x))).

    The norms stand in megatron-core's slots input_layernorm and pre_mlp_layernorm, but *after* attention and
    after the MLP: megatron-core's own option for post-LN is read by nothing.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] to [S, B, H]; the None is megatron-core's context."""
        dropout = self.hidden_dropout if self.training else 0.0
        attended, bias = self.self_attention(
            hidden_states,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = self.input_layernorm(attended, hidden_states, bias, dropout)
        fed_forward, bias = self.mlp(hidden_states)
        return self.pre_mlp_layernorm(fed_forward, hidden_states, bias, dropout), None


def block_spec(num_layers: int, buckets: Tensor) -> TransformerBlockSubmodules:
    """num_layers post-LN layers; buckets [S, S] is one tensor for all of them."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ModuleSpec(module=RelativeAttention, params={"buckets": buckets}),
        linear_proj=RowParallelLinear,
    )
    layer = ModuleSpec(
        module=PostNormLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=attention,
            ),
            input_layernorm=LayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            pre_mlp_layernorm=LayerNorm,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=None)


def linear(in_features: int, out_features: int) -> torch.nn.Linear:
    """A replicated linear layer on this process's device, weights not yet set."""
    return torch.nn.utils.skip_init(torch.nn.Linear, in_features, out_features, device=torch.cuda.current_device())
