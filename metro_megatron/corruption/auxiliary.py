"""METRO's corruption: an auxiliary model that learns to fill masks beside the main model, and fills them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.transformer.module import MegatronModule

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.encoder import AuxiliaryModel, TiedParameters
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.terms import num_distractors
from metro_megatron.parallel.layout import Layout


class TrainedAuxiliary(Corruptor):
    """Loss and samples from one pass: without dropout, training logits are sampling logits (METRO sec. 4).

    It borrows what both encoders share (model.shared_embeddings, model.shared_lm_bias); the rest is its own.
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        self.term = MaskedLanguageModel(config)
        self.terms = (self.term,)
        self.num_distractors = num_distractors(config)
        self.group = layout.tensor
        transformer = mcore.auxiliary_config(config, layout.device)
        head, lent = self.term.head(transformer), tied.for_auxiliary()
        self.model = AuxiliaryModel(transformer, config.model, lent, layout.shared_groups, head)

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        return {self.term.name: self.model}

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        decoding = self.model(micro_batch)
        found = self.term.statistics(decoding, micro_batch, self.group, micro_batch.noise_keys)
        assert found.sampled is not None
        targets = micro_batch.masked_targets
        loss, sums = self.term.summed(found, targets)
        if torch.is_grad_enabled():
            scale_loss(weighted(self.terms, {self.term.name: loss}, batch.step, batch)).backward()
        distractors = self.term.distractors(decoding, micro_batch, self.group, self.num_distractors)
        return Proposal(found.sampled, {**sums, "sample_correct": (found.sampled == targets).sum()}, distractors)
