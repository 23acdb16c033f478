"""Heads behind the encoders. All work on gathered positions, whole on every tensor-parallel rank.

Legend: M masked positions, H hidden, V vocabulary rows of this rank.
"""

from typing import NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from metro_megatron.mcore import without_sequence_parallel
from metro_megatron.model.layer import linear
from metro_megatron.model.norm import LayerNorm
from metro_megatron.vocabulary import padded_vocab_size


class Decoding(NamedTuple):
    """Logits that are not computed yet: rows weight^T + bias."""

    rows: Tensor
    """[M, H], whole on every tensor-parallel rank; their gradients are summed over the ranks."""
    weight: Tensor
    """This rank's rows of the token embedding [V, H]."""
    bias: Tensor
    """[V]."""

    def logits(self) -> Tensor:
        """All of this rank's, [M, V]."""
        return functional.linear(*self)


class CLMHead(MegatronModule):
    """Corrective language modelling: h E^T + b with the tied token embedding E (METRO eq. 8)."""

    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__(config=config)
        self.decoder = ColumnParallelLinear(
            config.hidden_size,
            padded_vocab_size(vocab_size),
            config=without_sequence_parallel(config),
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_weight_param_allocation=True,
        )

    def forward(self, hidden: Tensor, word: Tensor) -> Decoding:
        """hidden [M, H] and this rank's rows of the token embedding [V, H]; the decoder only owns the bias."""
        return Decoding(copy_to_tensor_model_parallel_region(hidden), word, self.decoder.bias)


class MLMHead(CLMHead):
    """Masked language modelling: LN(gelu(h W + b)) before the tied decoder (METRO eq. 4, COCO-LM's head)."""

    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.dense = linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(
            without_sequence_parallel(config), hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: Tensor, word: Tensor) -> Decoding:
        """hidden [M, H] and this rank's rows of the token embedding [V, H]."""
        return super().forward(self.norm(functional.gelu(self.dense(hidden))), word)
