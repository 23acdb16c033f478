"""Replacements that a frozen model drew before the run: read with the batch, no model runs (Fast-ELECTRA)."""

from __future__ import annotations

from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch


class Cached(Corruptor):
    """What data/replacements.py has read."""

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        assert micro_batch.replacements is not None
        return Proposal(micro_batch.replacements, {})
