"""Heads behind the encoders, whole on every tensor-parallel rank but for the vocabulary.

Every head is called with (hidden [S, B, H], micro batch, token embedding) and looks where its loss does.

Legend: S positions, B rows, M masked positions, H hidden, D width of the token table, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from metro_megatron.config.schema import ModelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.layer import linear
from metro_megatron.model.norm import LayerNorm, outside_layers


class Decoding(NamedTuple):
    """Logits that are not computed yet: rows weight^T + bias."""

    rows: Tensor
    """[M, D], whole on every tensor-parallel rank; their gradients are summed over the ranks."""
    weight: Tensor
    """This rank's rows of the token embedding [V, D]."""
    bias: Tensor
    """[V]."""

    def logits(self) -> Tensor:
        """All of this rank's, [M, V]."""
        return functional.linear(*self)


class TokenHead(torch.nn.Linear):
    """One logit for every position: h w + b, in FP32, as 16 bits tell logits of 4 to 8 apart in steps of 0.03 only."""

    def __init__(self, hidden_size: int, device: torch.device | None = None):
        super().__init__(hidden_size, 1, device=device)

    @classmethod
    def unset(cls, config: TransformerConfig) -> TokenHead:
        """One on this process's device, weights not yet set."""
        return torch.nn.utils.skip_init(cls, config.hidden_size, device=torch.cuda.current_device())

    def forward(self, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Tensor:  # type: ignore[override]
        """[S, B], at least in FP32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return functional.linear(*(one.to(dtype) for one in (hidden, self.weight, self.bias))).squeeze(-1)


class SequenceHead(MegatronModule):
    """LN(gelu(h W + b)) of <s>, for every sample (COCO-LM)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.dense = linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(outside_layers(config), hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Tensor:
        """[n, H], n samples of the micro batch."""
        return self.norm(functional.gelu(self.dense(hidden.flatten(0, 1)[micro_batch.first_index])))


class DenseTokenHead(TokenHead):
    """One logit for every position of gelu(h W + b) (ELECTRA's discriminator)."""

    def __init__(self, hidden_size: int, device: torch.device | None = None):
        super().__init__(hidden_size, device)
        self.dense = torch.nn.Linear(hidden_size, hidden_size, device=device)

    def forward(self, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Tensor:  # type: ignore[override]
        """[S, B], at least in FP32."""
        return super().forward(functional.gelu(self.dense(hidden)), micro_batch, word)


RTD_HEADS = {"linear": TokenHead, "dense": DenseTokenHead}
"""By model.rtd_head."""


def decoder_bias(config: TransformerConfig, model_config: ModelConfig) -> ColumnParallelLinear:
    """A decoder that only owns its bias, split as the token embedding's rows are; the product is the loss's affair."""
    return ColumnParallelLinear(
        model_config.table_width,
        model_config.padded_vocab_size,
        config=outside_layers(config),
        init_method=config.init_method,
        bias=True,
        gather_output=False,
        skip_weight_param_allocation=True,
    )


class TiedDecoder(MegatronModule):
    """h E^T + b with the tied token embedding E, at the masked positions (METRO eq. 8); H must be D."""

    def __init__(self, config: TransformerConfig, model_config: ModelConfig):
        super().__init__(config=config)
        self.decoder = decoder_bias(config, model_config)
        self.borrowed: tuple[ColumnParallelLinear, ...] = ()

    def borrow(self, decoder: ColumnParallelLinear) -> None:
        """Take another module's bias, which that one trains, in place of an own one."""
        del self.decoder
        self.borrowed = (decoder,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Decoding:
        rows = self.transform(hidden.flatten(0, 1)[micro_batch.masked_index])
        (decoder,) = self.borrowed or (self.decoder,)
        return Decoding(copy_to_tensor_model_parallel_region(rows), word, decoder.bias)

    def transform(self, rows: Tensor) -> Tensor:
        """[M, H] to what the decoder reads, [M, D]."""
        return rows


class MLMHead(TiedDecoder):
    """LN(gelu(h W + b)), of width D, before the tied decoder (METRO eq. 4; BERT's, COCO-LM's and ELECTRA's head)."""

    def __init__(self, config: TransformerConfig, model_config: ModelConfig):
        super().__init__(config, model_config)
        width = model_config.table_width
        self.dense = linear(config.hidden_size, width)
        self.norm = LayerNorm(outside_layers(config), hidden_size=width, eps=config.layernorm_epsilon)

    def transform(self, rows: Tensor) -> Tensor:
        return self.norm(functional.gelu(self.dense(rows)))


LM_HEADS = {"linear": TiedDecoder, "dense": MLMHead}
"""By model.lm_head."""
