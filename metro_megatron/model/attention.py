"""What stands in megatron-core's core_attention slot: attention with the relative-position table.

Legend: S positions, B rows, T tokens of a packed row, N heads of this rank, K head dimension, b buckets.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fused.attention import packed_attention, padded_attention


class RelativeAttention(torch.nn.Module):
    """Softmax attention whose attention_bias is the *table* [b + 1, N], not the expanded bias.

    The table is a leaf of the graph, so that recomputation can expand it again.
    """

    buckets: Tensor

    def __init__(self, config: TransformerConfig, buckets: Tensor, **slot: object):
        super().__init__()
        self.dropout = config.attention_dropout
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Packed: [T, N, K] to [T, N, K]. Padded: [S, B, N, K] and attention_mask [B, 1, 1, S] (True where
        there is no key) to [S, B, N K]."""
        assert attention_bias is not None
        length = packed_seq_params.max_seqlen_q if packed_seq_params else query.size(0)
        bias = attention_bias[self.buckets[:length, :length]].permute(2, 0, 1)
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork():
            if packed_seq_params is not None:
                ends = packed_seq_params.cu_seqlens_q
                return packed_attention(query, key, value, bias, ends, length, dropout)
            assert attention_mask is not None
            is_key = ~attention_mask[:, 0, 0]
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            out = padded_attention(q, k, v, bias, is_key, dropout)
        return out.transpose(0, 1).flatten(2)
