"""What an encoder learned about positions, and what attention adds to its scores because of it.

Legend: S positions of the longest sample, L of this micro batch's, H hidden, D width of the token table,
N heads of this rank, K head dimension.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from fused.attention import CompactBias
from metro_megatron.config.position import PositionScheme
from metro_megatron.config.schema import ModelConfig
from metro_megatron.model.norm import LayerNorm, mark_sequence_parallel, outside_layers

IN_FP32 = "stays_in_fp32"
"""Mark of a parameter that a run in 16 bits keeps in FP32."""


class Added(NamedTuple):
    """What attention adds to its scores, the same in all layers of an encoder."""

    bias: CompactBias | None
    """None where the scheme has no relative biases."""
    term: Tensor | None
    """[N, L, L] of absolute positions, None where the scheme has none."""


class _Base(torch.autograd.Function):
    """Hands hidden states on to the layers; in backward, when all of these are through, takes what they found.

    Layers read copies, leaves whose gradients add up in `.grad`: a layer that is recomputed runs its backward pass by
    itself, and the graph of the originals would be gone after the first one. So torch.autograd.grad, which writes no
    `.grad`, cannot be used, as it cannot with megatron-core's recomputation.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, copies: list[Tensor | None], *originals: Tensor | None
    ) -> Tensor:
        ctx.copies = copies
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [None if copy is None else copy.grad for copy in ctx.copies]
        for copy, one in zip(ctx.copies, found, strict=True):
            if copy is not None:
                assert one is not None, "gradients of positions need backward(), not torch.autograd.grad()"
                copy.grad = None  # for whoever runs backward again
        return gradient, None, *found


class Positions(MegatronModule):
    """The parameters of one encoder's position scheme, split over heads."""

    def __init__(self, config: TransformerConfig, scheme: PositionScheme, tensor_group: ProcessGroup):
        super().__init__(config=config)
        self.scheme = scheme
        self.tp_group = tensor_group
        if scheme.buckets is not None:
            heads = config.num_attention_heads // tensor_group.size()
            device = torch.cuda.current_device()
            self.weight = torch.nn.Parameter(torch.empty(scheme.num_rows, heads, device=device))
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)
            setattr(self.weight, IN_FP32, True)  # some kilobytes, which all layers' scores read
            rows = torch.tensor([*scheme.distance_rows(), *scheme.cls_rows()], device=device)
            self.register_buffer("row_of", torch.nn.functional.one_hot(rows, scheme.num_rows).float(), persistent=False)
        if scheme.is_untied:
            self.untied = UntiedTerm(config, scheme, tensor_group)

    def forward(self, hidden: Tensor, length: int) -> tuple[Tensor, Added]:
        """Hidden states [S, B, H] on their way into the layers, and what these add for samples of `length` or less.

        Made once for all layers. Their gradients come back with that of the hidden states.
        """
        distances, cls = self.bias() or (None, None)
        # Attention's kernels are compiled anew for a term whose side 16 does not divide.
        side = min(-(-length // 16) * 16, self.scheme.positions)
        originals = (distances, cls, self.term(side))
        copies = [None if one is None else one.detach().contiguous().requires_grad_() for one in originals]
        hidden = _Base.apply(hidden, copies, *originals)
        distances, cls, term = copies
        return hidden, Added(None if distances is None else CompactBias(distances, cls), term)

    def bias(self) -> CompactBias | None:
        """The relative biases, at least in FP32, in which layers' gradients add up; None where the scheme has none."""
        if self.scheme.buckets is None:
            return None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # A product, not a gather, whose gradient would be sorted or summed in no fixed order.
        compact = (self.row_of.to(dtype) @ self.weight.to(dtype)).t()
        if not self.scheme.resets_cls:
            return CompactBias(compact, None)
        return CompactBias(compact[:, :-2], compact[:, -2:])

    def term(self, length: int) -> Tensor | None:
        """The term [N, L, L] of absolute positions, None where the scheme has none."""
        return self.untied(length) if self.scheme.is_untied else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """megatron-core's, which takes a module's own parameters for replicated, but for the table."""
        assert metadata is not None
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.scheme.buckets is not None:
            key = f"{prefix}weight"
            sharded[key] = make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                tp_axis=1,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return sharded


class UntiedTerm(MegatronModule):
    """TUPE's untied positions: (LN(P) U + u) (LN(P) W + w)^T / sqrt(2 K), of P alone and per head.

    Content and positions are two products in one score, each divided by sqrt(2 K). Where [CLS] is reset, two rows of P
    stand before those of the sample: row 0 with itself makes the score of [CLS] to all, row 1 that of all to [CLS],
    and position 0 reads no other, so that P has S + 1 rows.
    """

    def __init__(self, config: TransformerConfig, scheme: PositionScheme, tensor_group: ProcessGroup):
        # Every tensor-parallel rank has all positions, whatever part of a sample it holds elsewhere.
        config = outside_layers(config)
        super().__init__(config=config)
        self.resets_cls = scheme.resets_cls
        rows, hidden, device = scheme.positions + scheme.resets_cls, config.hidden_size, torch.cuda.current_device()
        self.position = torch.nn.utils.skip_init(torch.nn.Embedding, rows, hidden, device=device)
        self.norm = LayerNorm(config, hidden_size=hidden, eps=config.layernorm_epsilon)
        self.query, self.key = (
            ColumnParallelLinear(
                hidden,
                hidden,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                tp_group=tensor_group,
            )
            for _ in range(2)
        )
        self.head_dim = hidden // config.num_attention_heads

    def forward(self, length: int) -> Tensor:
        """[N, L, L] of (head, query, key)."""
        normed = self.norm(self.position.weight[: length + self.resets_cls])
        q, k = (layer(normed)[0].unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for layer in (self.query, self.key))
        term = q @ k.transpose(1, 2) * (2 * self.head_dim) ** -0.5
        if not self.resets_cls:
            return term
        is_first = torch.arange(length, device=term.device) == 0
        dense = torch.where(is_first, term[:, 1, 1, None, None], term[:, 1:, 1:])
        return torch.where(is_first[:, None], term[:, 0, 0, None, None], dense)


def position_table(config: TransformerConfig, model_config: ModelConfig) -> torch.nn.Embedding:
    """Learned absolute positions [P, D]: as wide as the token table."""
    table = torch.nn.utils.skip_init(
        torch.nn.Embedding,
        model_config.max_position_embeddings,
        model_config.table_width,
        device=torch.cuda.current_device(),
    )
    mark_sequence_parallel(table, config)
    return table
