"""Self-attention on megatron-core's parameters: attention inside samples, with what positions add to it.

Legend: S positions, B rows, T = S B tokens, H hidden, N heads of this rank, K head dimension.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fused.attention import attention, attention_qkvpacked
from metro_megatron.model.recompute import remade, same
from metro_megatron.model.sequences import Sequences, sites_of_layer


class Attention(SelfAttention):
    """megatron-core's, whose parameters it has, without cutting q, k and v apart: their gradient is one tensor."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, sequences: Sequences, norm: Callable[[Tensor], Tensor] = same
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] to the same and the bias of the last linear layer, which is not yet added; norm: pre-LN's."""

        def attend(heads: Tensor) -> Tensor:
            return self.core_attention(heads, sequences).view(*qkv.shape[:2], -1)

        qkv, _ = remade(self.config, "layernorm", norm, self.linear_qkv, hidden_states)
        return remade(self.config, "core_attn", attend, self.linear_proj, self.heads(qkv))

    def heads(self, qkv: Tensor) -> Tensor:
        """[S, B, 3 N K] to [T, N, 3, K]: q, k and v of a head stand together."""
        return qkv.view(-1, self.num_attention_heads_per_partition, 3, self.hidden_size_per_attention_head)


class CoreAttention(torch.nn.Module):
    """What stands in megatron-core's core_attention slot: softmax attention, with dropout, inside the samples."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **slot: object,
    ):
        super().__init__()
        self.dropout = config.attention_dropout
        self.site = sites_of_layer(layer_number).attention
        self.tensor_rank = pg_collection.tp.rank()

    def forward(self, qkv: Tensor, sequences: Sequences) -> Tensor:
        """[T, N, 3, K] to [T, N, K]."""
        assert sequences.samples is not None
        samples, keys, dropout = sequences.samples, sequences.dropout, None
        if self.training and keys is not None:
            dropout = keys.of_attention(self.dropout, self.site, self.tensor_rank * qkv.size(1))
        bias, term = sequences.added
        if term is None:
            return attention_qkvpacked(qkv, bias, samples, dropout)
        q, k, v = qkv.unbind(2)
        # With the operator's sqrt(K): sqrt(2 K), as the term has it.
        return attention(q * 2**-0.5, k, v, bias, samples, dropout, term)
