"""Phase 1: the auxiliary model learns to fill masked positions and proposes replacements for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metro_megatron.config import ModelConfig
from metro_megatron.corruption.sampling import gumbel_max_sample, vocabulary_argmax
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.tokenizer import NUM_SPECIALS
from metro_megatron.objective.losses import cross_entropy_sum, real_logits


@dataclass(frozen=True)
class Proposal:
    """What the auxiliary says about one micro batch; M masked positions."""

    loss: Tensor
    """Sum over M of the MLM cross-entropy, with its graph."""
    sampled: Tensor
    """Replacement ids [M]; no gradient flows through them."""
    predicted: Tensor
    """Most probable ids [M]."""


def propose(auxiliary: torch.nn.Module, batch: MicroBatch, model: ModelConfig, group) -> Proposal:
    """Loss and samples from one pass: without dropout, training logits are sampling logits (METRO sec. 4).

    auxiliary is an AuxiliaryModel, possibly wrapped; group is its tensor-parallel group.
    """
    logits = real_logits(auxiliary(batch), model.vocab_size, group)
    loss = cross_entropy_sum(logits, batch.masked_targets)
    fixed = logits.detach()
    sampled = gumbel_max_sample(fixed, batch.noise_keys, group, NUM_SPECIALS)
    return Proposal(loss, sampled, vocabulary_argmax(fixed, group))


def corrupt(batch: MicroBatch, sampled: Tensor) -> Tensor:
    """X_noise [B, S]: the original ids with the samples [M] in the masked places."""
    tokens = batch.tokens.t().flatten()  # masked_index counts in [S, B] order
    tokens = tokens.index_copy(0, batch.masked_index, sampled)
    return tokens.view(batch.tokens.size(1), batch.tokens.size(0)).t().contiguous()
