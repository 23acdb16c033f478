"""What stands in megatron-core's core_attention slot: attention with the relative-position table.

Legend: S positions, B rows, T tokens of a packed row, N heads of this rank, K head dimension, b buckets.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fused.attention import CompactBias, attention
from metro_megatron.model.sequences import SITES_PER_LAYER, Sequences


class RelativeAttention(torch.nn.Module):
    """Softmax attention whose attention_bias is the *table* [b + 1, N]; choice is that of compact_choice.

    The table is a leaf of the graph, so that recomputation can choose from it again.
    """

    choice: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        choice: Tensor,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **slot: object,
    ):
        super().__init__()
        self.dropout = config.attention_dropout
        self.site = SITES_PER_LAYER * layer_number - 2
        self.tensor_rank = pg_collection.tp.rank()
        self.register_buffer("choice", choice, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Sequences | None = None,
    ) -> Tensor:
        """Packed: [T, N, K] to [T, N, K]. Padded: [S, B, N, K] to [S, B, N K]."""
        assert attention_bias is not None and packed_seq_params is not None and packed_seq_params.samples is not None
        # A product, not a gather, whose gradient would be sorted or summed in no fixed order.
        compact = (self.choice.to(attention_bias.dtype) @ attention_bias).t()
        bias = CompactBias(compact[:, :-2], compact[:, -2:])
        keys, dropout = packed_seq_params.dropout, None
        if self.training and keys is not None:
            dropout = keys.of_attention(self.dropout, self.site, self.tensor_rank * query.size(-2))
        q, k, v = (x.flatten(0, -3) for x in (query, key, value))  # [T or S B, N, K]
        out = attention(q, k, v, bias, packed_seq_params.samples, dropout)
        return out if query.dim() == 3 else out.view(*query.shape[:2], -1)
