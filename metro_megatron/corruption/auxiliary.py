"""Phase 1: the auxiliary model learns to fill masked positions and proposes replacements for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.data.batch import MicroBatch
from metro_megatron.objective.losses import vocabulary_statistics


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
    found = vocabulary_statistics(auxiliary(batch), batch.masked_targets, model.vocab_size, group, batch.noise_keys)
    assert found.sampled is not None
    return Proposal(found.loss.sum(), found.sampled, found.predicted)


def corrupt(batch: MicroBatch, sampled: Tensor) -> Tensor:
    """X_noise [B, S]: the original ids with the samples [M] in the masked places."""
    tokens = batch.tokens.t().flatten()  # masked_index counts in [S, B] order
    tokens = tokens.index_copy(0, batch.masked_index, sampled)
    return tokens.view(batch.tokens.size(1), batch.tokens.size(0)).t().contiguous()
