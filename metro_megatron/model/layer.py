"""Transformer layers from the parts of an implementation: post-LN as in BERT and METRO, or pre-LN.

Legend: S positions, B rows, H hidden.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from fused.layer_norm import RowDropout
from metro_megatron.model import early_exit
from metro_megatron.model.attention import Attention, CoreAttention
from metro_megatron.model.linear import TRANSFORMER_ENGINE, ColumnLinear, RowLinear
from metro_megatron.model.mlp import feed_forward
from metro_megatron.model.norm import LayerNorm, add_dropped
from metro_megatron.model.recompute import same
from metro_megatron.model.sequences import LayerSites, Sequences, sites_of_layer


class LayerParts(NamedTuple):
    """Classes of one implementation for the slots of a layer, called and built as the local ones below are."""

    column: type[torch.nn.Module]
    """Linear layer split over its outputs, for q, k, v and for the MLP's first: megatron-core's signature."""
    row: type[torch.nn.Module]
    """Linear layer split over its inputs, for the two that write to the residual stream: megatron-core's signature."""
    norm: type[torch.nn.Module]
    """norm(config, hidden_size, eps); LN(residual + dropout(x + x_bias)), all but x may be absent."""
    core_attention: type[torch.nn.Module]
    """Attention between the linear layers, core_attention(qkv, sequences): [T, N, 3, K] to [T, N, K]."""


LOCAL = LayerParts(ColumnLinear, RowLinear, LayerNorm, CoreAttention)
"""megatron-core's linear layers, our norm and our attention: they run everywhere."""


def parts_of(config: TransformerConfig) -> LayerParts:
    """Those of config.transformer_impl: of Transformer Engine the linear layers alone.

    Its attention has no learned bias in packed rows, and its norms neither dropout nor residual.
    """
    if config.transformer_impl == "local":
        return LOCAL
    column, row = TRANSFORMER_ENGINE
    return LOCAL._replace(column=column, row=row)


class _Layer(TransformerLayer):
    """What both orders share. megatron-core's slots keep their names: parameters and checkpoints know them."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Sequences | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] to [S, B, H]; the None is megatron-core's context."""
        assert packed_seq_params is not None
        rows = packed_seq_params.rows_of_layer(self.layer_number)
        updated = self.transform(hidden_states, packed_seq_params, sites_of_layer(self.layer_number))
        return updated if rows is None else rows.put_back(hidden_states, updated), None

    @abstractmethod
    def transform(self, hidden: Tensor, sequences: Sequences, sites: LayerSites) -> Tensor:
        """[S, B, H] to the new states of the rows that this layer updates: [S, B, H] if no token has left."""

    def attend(
        self, hidden: Tensor, sequences: Sequences, norm: Callable[[Tensor], Tensor] = same
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention and the bias of its last linear layer, which is added where dropout is; norm: pre-LN's."""
        rows = sequences.rows_of_layer(self.layer_number)
        if rows is not None:
            return early_exit.attend(self.self_attention, norm(hidden), sequences, rows)
        return self.self_attention(hidden, sequences, norm)

    def residual(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """Of hidden [S, B, H], what attention's output is added to."""
        rows = sequences.rows_of_layer(self.layer_number)
        return hidden if rows is None else rows.gather(hidden)

    def dropout(self, sequences: Sequences, site: int) -> RowDropout | None:
        """That of the hidden states of one site; None where nothing is dropped."""
        rows = sequences.rows_of_layer(self.layer_number)
        keys = sequences.dropout if rows is None else rows.dropout
        if not self.training or keys is None:
            return None
        return keys.of_rows(self.hidden_dropout, site)


class PostNormLayer(_Layer):
    """x <- LN(x + drop(attention(x))), then x <- LN(x + drop(mlp(x))).

    The norms stand in megatron-core's slots input_layernorm and pre_mlp_layernorm, but *after* attention and
    after the MLP: megatron-core's own option for post-LN is read by nothing.
    """

    def transform(self, hidden: Tensor, sequences: Sequences, sites: LayerSites) -> Tensor:
        attended, bias = self.attend(hidden, sequences)
        hidden = self.residual(hidden, sequences)
        hidden = self.input_layernorm(attended, hidden, bias, self.dropout(sequences, sites.after_attention))
        fed_forward, bias = feed_forward(self.mlp, hidden)
        return self.pre_mlp_layernorm(fed_forward, hidden, bias, self.dropout(sequences, sites.after_mlp))


class PreNormLayer(_Layer):
    """x <- x + drop(attention(LN(x))), then x <- x + drop(mlp(LN(x))); the block ends with another norm."""

    def transform(self, hidden: Tensor, sequences: Sequences, sites: LayerSites) -> Tensor:
        attended, bias = self.attend(hidden, sequences, self.input_layernorm)
        hidden = self.residual(hidden, sequences)
        hidden = add_dropped(attended, hidden, bias, self.dropout(sequences, sites.after_attention))
        fed_forward, bias = feed_forward(self.mlp, hidden, self.pre_mlp_layernorm)
        return add_dropped(fed_forward, hidden, bias, self.dropout(sequences, sites.after_mlp))


def block_spec(parts: LayerParts, num_layers: int, norms_first: bool = False) -> TransformerBlockSubmodules:
    """num_layers layers; norms_first: pre-LN and a final norm on the last stage."""
    core_attention: Any = parts.core_attention
    attention = SelfAttentionSubmodules(linear_qkv=parts.column, core_attention=core_attention, linear_proj=parts.row)
    layer = ModuleSpec(
        module=PreNormLayer if norms_first else PostNormLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=attention,
            ),
            input_layernorm=parts.norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)),
            pre_mlp_layernorm=parts.norm,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=parts.norm if norms_first else None)


def linear(in_features: int, out_features: int) -> torch.nn.Linear:
    """A replicated linear layer on this process's device, weights not yet set."""
    return torch.nn.utils.skip_init(torch.nn.Linear, in_features, out_features, device=torch.cuda.current_device())
