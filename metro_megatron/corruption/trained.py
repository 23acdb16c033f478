"""A masked language model that fills masks and learns to fill them on the way: phase 1 of a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fused.linear_cross_entropy import Sampling
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss, sampling_of
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.heads import Decoding
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.terms import main_terms, num_distractors
from metro_megatron.parallel.layout import Layout


class TrainedModel(Corruptor):
    """Loss and samples from one pass, or with model.auxiliary_dropout eval from one each; the loss has weight 1.

    Without dropout, training logits are sampling logits (METRO sec. 4). With eval, samples and distractors come from a
    first pass without dropout (COCO-LM).
    """

    def __init__(self, config: Config, layout: Layout):
        self.config = config
        self.term = MaskedLanguageModel(config)
        self.terms = (self.term,)
        self.num_distractors = num_distractors(main_terms(config))
        self.group = layout.tensor

    @abstractmethod
    def read(self, micro_batch: MicroBatch, drops: bool) -> Decoding:
        """What the model says of the masked text; drops: with its dropout, if it is training."""

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        sampling = sampling_of(self.config, micro_batch, batch)
        if torch.is_grad_enabled() and self.config.model.auxiliary_dropout == "eval":
            with torch.no_grad():
                first = self.read(micro_batch, drops=False)
                drawn = self.term.statistics(first, micro_batch, self.group, sampling).sampled
                distractors = self._distractors(first, micro_batch, sampling)
            found = self.term.statistics(self.read(micro_batch, drops=True), micro_batch, self.group)
            found = found._replace(sampled=drawn)
        else:
            decoding = self.read(micro_batch, drops=True)
            found = self.term.statistics(decoding, micro_batch, self.group, sampling)
            distractors = self._distractors(decoding, micro_batch, sampling)
        assert found.sampled is not None
        loss, sums = self.term.summed(found, micro_batch.masked_targets)
        if torch.is_grad_enabled():
            scale_loss(weighted(self.terms, {self.term.name: loss}, batch.step, batch)).backward()
        return Proposal(found.sampled, sums, distractors, found.loss.detach())

    def _distractors(self, decoding: Decoding, micro_batch: MicroBatch, sampling: Sampling) -> Tensor | None:
        return self.term.distractors(decoding, micro_batch, self.group, sampling, self.num_distractors)


@contextmanager
def dropping(module: nn.Module, drops: bool) -> Iterator[None]:
    """The module's dropout as it is, or if it shall not drop, without; afterwards all is as before."""
    before = module.training
    module.train(before and drops)
    try:
        yield
    finally:
        module.train(before)
