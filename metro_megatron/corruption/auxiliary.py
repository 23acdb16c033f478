"""METRO's corruption: an auxiliary model that learns to fill masks beside the main model, and fills them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.transformer.module import MegatronModule

from fused.linear_cross_entropy import Sampling
from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss, sampling_of
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.encoder import AuxiliaryModel, TiedParameters
from metro_megatron.model.heads import Decoding
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.terms import num_distractors
from metro_megatron.parallel.layout import Layout


class TrainedAuxiliary(Corruptor):
    """Loss and samples from one pass, or with model.auxiliary_dropout eval from one each.

    Without dropout, training logits are sampling logits (METRO sec. 4). It borrows what both encoders share
    (model.shared_embeddings, model.shared_lm_bias); the rest is its own.
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        self.config = config
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
        sampling, targets = sampling_of(self.config, micro_batch, batch), micro_batch.masked_targets
        if torch.is_grad_enabled() and self.config.model.auxiliary_dropout == "eval":
            sampled, distractors = self._draw_without_dropout(micro_batch, sampling)
            found = self.term.statistics(self.model(micro_batch), micro_batch, self.group)
        else:
            decoding = self.model(micro_batch)
            found = self.term.statistics(decoding, micro_batch, self.group, sampling)
            sampled, distractors = found.sampled, self._distractors(decoding, micro_batch, sampling)
        assert sampled is not None
        loss, sums = self.term.summed(found, targets)
        if torch.is_grad_enabled():
            scale_loss(weighted(self.terms, {self.term.name: loss}, batch.step, batch)).backward()
        return Proposal(sampled, {**sums, "sample_correct": (sampled == targets).sum()}, distractors)

    @torch.no_grad()
    def _draw_without_dropout(
        self, micro_batch: MicroBatch, sampling: Sampling
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """COCO-LM's first pass: samples and distractors."""
        self.model.eval()
        decoding = self.model(micro_batch)
        self.model.train()
        found = self.term.statistics(decoding, micro_batch, self.group, sampling)
        return found.sampled, self._distractors(decoding, micro_batch, sampling)

    def _distractors(self, decoding: Decoding, micro_batch: MicroBatch, sampling: Sampling) -> torch.Tensor | None:
        return self.term.distractors(decoding, micro_batch, self.group, sampling, self.num_distractors)
