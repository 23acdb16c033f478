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

from fused.layer_norm import RowDropout
from metro_megatron.model.attention import RelativeAttention
from metro_megatron.model.norm import LayerNorm
from metro_megatron.model.sequences import SITES_PER_LAYER, Sequences


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
        packed_seq_params: Sequences | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] to [S, B, H]; the None is megatron-core's context."""
        assert packed_seq_params is not None
        attended, bias = self.self_attention(
            hidden_states,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        dropout = self._dropout(packed_seq_params, -1)
        hidden_states = self.input_layernorm(attended, hidden_states, bias, dropout)
        fed_forward, bias = self.mlp(hidden_states)
        dropout = self._dropout(packed_seq_params, 0)
        return self.pre_mlp_layernorm(fed_forward, hidden_states, bias, dropout), None

    def _dropout(self, sequences: Sequences, place: int) -> RowDropout | None:
        if not self.training or sequences.dropout is None:
            return None
        return sequences.dropout.of_rows(self.hidden_dropout, SITES_PER_LAYER * self.layer_number + place)


def block_spec(num_layers: int, choice: Tensor) -> TransformerBlockSubmodules:
    """num_layers post-LN layers; choice (that of compact_choice) is one tensor for all of them."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ModuleSpec(module=RelativeAttention, params={"choice": choice}),
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
