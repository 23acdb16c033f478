"""Relative positions: bucket functions, the reset of [CLS], and the table that every layer borrows.

Legend: S positions, b buckets, N heads of this rank.
"""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from metro_megatron.config.schema import ModelConfig


def coco_bucket(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """COCO-LM's buckets of relative = key - query, signed: logarithmic from b/4 on, rounded up."""
    side = num_buckets // 2
    exact = side // 2
    distance = relative.abs()
    scale = torch.log(torch.tensor((max_distance - 1) / exact, dtype=torch.float64))
    logarithmic = torch.log(distance.clamp(min=1).double() / exact) / scale * (side - 1 - exact)
    bucket = torch.where(distance < exact, distance, exact + logarithmic.ceil().long())
    return relative.sign() * bucket.clamp(max=side - 1)


def t5_bucket(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bidirectional buckets of relative = key - query: later keys in the upper half, rounded down."""
    side = num_buckets // 2
    exact = side // 2
    distance = relative.abs()
    scale = torch.log(torch.tensor(max_distance / exact, dtype=torch.float64))
    logarithmic = torch.log(distance.clamp(min=1).double() / exact) / scale * (side - exact)
    bucket = torch.where(distance < exact, distance, exact + logarithmic.floor().long())
    return bucket.clamp(max=side - 1) + side * (relative > 0)


def bucket_table(model: ModelConfig) -> Tensor:
    """Row of the relative-position table for every (query, key): [S, S] int64, S = max_position_embeddings.

    COCO-LM's ids are shifted by their minimum over the whole table, so the table is made at full size and
    sliced for shorter samples. Position 0 is [CLS]: its row of attention reads table row b - 1, which no
    distance uses, and its column reads the additional row b (TUPE's reset, METRO "reset [CLS]").
    """
    buckets = model.relative_attention_num_buckets
    position = torch.arange(model.max_position_embeddings)
    relative = position[None, :] - position[:, None]
    if model.relative_bucket == "coco":
        table = coco_bucket(relative, buckets, model.relative_attention_max_distance)
        table = table - table.min()
        unused = buckets - 1
    else:
        table = t5_bucket(relative, buckets, model.relative_attention_max_distance)
        unused = buckets // 2
    table[:, 0] = buckets
    table[0, :] = unused
    return table


def compact_choice(model: ModelConfig) -> Tensor:
    """Which row of the table each number of fused.attention.CompactBias is: one-hot [2 (S - 2) + 3, b + 1].

    First distances -(S - 2) .. S - 2 between positions other than [CLS], then [CLS]'s row, then its column.
    """
    table = bucket_table(model)
    rows = torch.cat((table[1:, 1].flip(0), table[1, 2:], table[0, :1], table[1, :1]))
    return torch.nn.functional.one_hot(rows, model.relative_attention_num_buckets + 1).float()


class RelativePositionTable(MegatronModule):
    """The learned biases [b + 1, N] of one encoder, shared by its layers and split over heads."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tensor_group: ProcessGroup):
        super().__init__(config=config)
        self.tensor_group = tensor_group
        heads = model.num_attention_heads // tensor_group.size()
        device = torch.cuda.current_device()
        rows = model.relative_attention_num_buckets + 1
        self.weight = torch.nn.Parameter(torch.empty(rows, heads, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        assert metadata is not None
        key = f"{prefix}weight"
        sharded = make_tp_sharded_tensor_for_checkpoint(
            self.weight,
            key,
            tp_axis=1,
            prepend_offsets=sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {key: sharded}
