"""METRO's corruption: an auxiliary model that learns to fill masks beside the main model, and fills them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.transformer.module import MegatronModule

from fused.linear_cross_entropy import Sampling
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss, sampling_of
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.encoder import AuxiliaryModel, TiedParameters
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.parallel.layout import Layout


class TrainedAuxiliary(Corruptor):
    """Loss and samples from one pass, or with model.auxiliary_dropout eval from one each.

    Without dropout, training logits are sampling logits (METRO sec. 4). It borrows the token embedding; positions,
    norms and bias table are its own.
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters):
        self.config = config
        self.term = MaskedLanguageModel(config)
        self.terms = (self.term,)
        self.group = layout.tensor
        head, lent = self.term.head(tied.config), tied.lend("word")
        self.model = AuxiliaryModel(tied.config, config.model, lent, layout.shared_groups, head)

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        return {self.term.name: self.model}

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        sampling: Sampling | None = sampling_of(self.config, micro_batch, batch)
        sampled = None
        if torch.is_grad_enabled() and self.config.model.auxiliary_dropout == "eval":
            sampled, sampling = self._sampled_without_dropout(micro_batch, sampling), None
        found = self.term.statistics(self.model(micro_batch), micro_batch, self.group, sampling)
        sampled = found.sampled if sampled is None else sampled
        assert sampled is not None
        targets = micro_batch.masked_targets
        loss, sums = self.term.summed(found, targets)
        if torch.is_grad_enabled():
            scale_loss(weighted(self.terms, {self.term.name: loss}, batch.step, batch)).backward()
        return Proposal(sampled, {**sums, "sample_correct": (sampled == targets).sum()})

    @torch.no_grad()
    def _sampled_without_dropout(self, micro_batch: MicroBatch, sampling: Sampling | None) -> torch.Tensor | None:
        """COCO-LM's first pass."""
        self.model.eval()
        found = self.term.statistics(self.model(micro_batch), micro_batch, self.group, sampling)
        self.model.train()
        return found.sampled
