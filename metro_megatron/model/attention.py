"""What stands in megatron-core's core_attention slot: attention inside samples, with what positions add to it.

Legend: S positions, B rows, T tokens of a packed row, N heads of this rank, K head dimension.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fused.attention import attention
from metro_megatron.model.position import Positions
from metro_megatron.model.sequences import Sequences, sites_of_layer


class CoreAttention(torch.nn.Module):
    """Softmax attention with the encoder's positions, which it borrows: they live, and are counted, elsewhere."""

    def __init__(
        self,
        config: TransformerConfig,
        positions: Positions,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **slot: object,
    ):
        super().__init__()
        self.dropout = config.attention_dropout
        self.site = sites_of_layer(layer_number).attention
        self.tensor_rank = pg_collection.tp.rank()
        self.borrowed = (positions,)  # in a tuple, so that it is not registered as a submodule

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: object = None,
        attention_bias: None = None,
        packed_seq_params: Sequences | None = None,
    ) -> Tensor:
        """Packed: [T, N, K] to [T, N, K]. Padded: [S, B, N, K] to [S, B, N K]."""
        assert attention_bias is None and packed_seq_params is not None and packed_seq_params.samples is not None
        samples, keys, dropout = packed_seq_params.samples, packed_seq_params.dropout, None
        if self.training and keys is not None:
            dropout = keys.of_attention(self.dropout, self.site, self.tensor_rank * query.size(-2))
        bias, term = self.borrowed[0].bias(), self.borrowed[0].term(samples.longest)
        if term is not None:
            query = query * 2**-0.5  # with the operator's sqrt(K): sqrt(2 K), as the term has it
        q, k, v = (x.flatten(0, -3) for x in (query, key, value))  # [T or S B, N, K]
        out = attention(q, k, v, bias, samples, dropout, term)
        return out if query.dim() == 3 else out.view(*query.shape[:2], -1)
