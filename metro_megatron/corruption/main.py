"""Main fills its own masks: a head on one of its layers proposes, and no other model is there.

The study of what a generator is needed for (adaptive early exit for ELECTRA, recipe of ours: the paper's abstract says
no more than that it was made).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from fused.linear_cross_entropy import Sampling, Statistics
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal, ScaleLoss, sampling_of
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.encoder import MainModel, TiedParameters
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.parallel.layout import Layout


class MainLayers(Corruptor):
    """Main's layers up to corruption.main_layer read the masked text, and a head behind them names the originals.

    The MLM loss has weight 1, and its gradients go into those layers and main's embedding, beside those of phase 2;
    the head is this corruptor's own. All of main must be on this rank, as without a pipeline. The pass is not
    recomputed. Dropout is as model.auxiliary_dropout says, from masks of its own.
    """

    def __init__(self, config: Config, layout: Layout, tied: TiedParameters, main: MainModel):
        self.config = config
        self.term = MaskedLanguageModel(config)
        self.terms = (self.term,)
        self.group = layout.tensor
        self.main = main
        self.num_layers = config.corruption.main_layer or max(1, config.model.num_layers // 2)
        self.head = self.term.head(tied.config)

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        assert isinstance(self.head, MegatronModule)
        return {self.term.name: self.head}

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        sampling: Sampling | None = sampling_of(self.config, micro_batch, batch)
        mode = self.config.model.auxiliary_dropout
        sampled = None
        if torch.is_grad_enabled() and mode == "eval":
            with torch.no_grad():
                sampled, sampling = self._read(micro_batch, sampling, drops=False).sampled, None
        found = self._read(micro_batch, sampling, drops=mode != "zero")
        sampled = found.sampled if sampled is None else sampled
        assert sampled is not None
        targets = micro_batch.masked_targets
        loss, sums = self.term.summed(found, targets)
        if torch.is_grad_enabled():
            scale_loss(weighted(self.terms, {self.term.name: loss}, batch.step, batch)).backward()
        return Proposal(sampled, {**sums, "sample_correct": (sampled == targets).sum()})

    def _read(self, micro_batch: MicroBatch, sampling: Sampling | None, drops: bool) -> Statistics:
        with self._dropping(drops and self.main.training):
            hidden: Tensor = self.main.read_masked(micro_batch, self.num_layers)
        return self.term.statistics(self.head(hidden, micro_batch, self.main.word), micro_batch, self.group, sampling)

    @contextmanager
    def _dropping(self, drops: bool) -> Iterator[None]:
        before = self.main.training
        self.main.train(drops)
        try:
            yield
        finally:
            self.main.train(before)
