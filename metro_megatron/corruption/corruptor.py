"""The seat of corruption: where replacements for masked tokens come from.

Phase 1 of a step asks a corruptor for them, micro batch by micro batch; what it trains, if anything, it trains on the
way. The rest of the program knows of it the names of its modules, its figures, and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused.linear_cross_entropy import Sampling
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.objective.term import Sums, Term

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

ScaleLoss = Callable[[Tensor], Tensor]
"""fp16's loss scale, to be applied before backward."""


@dataclass(frozen=True)
class Proposal:
    """What a corruptor says about one micro batch."""

    sampled: Tensor
    """int64 [M] replacement ids of the M masked positions; no gradient flows through them."""
    sums: Sums
    """Of its own losses."""
    distractors: Tensor | None = None
    """int64 [M, C] distinct ids other than the originals, where main's losses want C of them."""
    losses: Tensor | None = None
    """[M] its own loss of each masked position, where it has one."""


def sampling_at(config: Config, micro_batch: MicroBatch, step: int) -> Sampling:
    """How a model's replacements are drawn in a step, counted from 0; train.train_steps stands for the run's end."""
    temperature = config.corruption.sampling_temperature.at(step, config.train.train_steps)
    return Sampling(micro_batch.noise_keys, temperature, config.corruption.disallow_correct)


def sampling_of(config: Config, micro_batch: MicroBatch, batch: StepBatch) -> Sampling:
    """The same for a batch.

    Evaluations, which have no gradients, draw at the temperature of the run's end, so that those of a run can be
    compared.
    """
    return sampling_at(config, micro_batch, batch.step if torch.is_grad_enabled() else config.train.train_steps)


class Corruptor(ABC):
    """Where X_noise comes from. Every pipeline rank asks it for its share of the micro batches."""

    terms: tuple[Term, ...] = ()
    """Its own losses: their sums are in every proposal."""

    @property
    def trained(self) -> Mapping[str, MegatronModule]:
        """Modules that this corruptor trains, by the first part of their global names.

        They get gradient buffers, optimizer state, initial values and a part of the checkpoint; a module that is not
        here, such as a frozen model, gets none of them.
        """
        return {}

    @abstractmethod
    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        """Replacements for micro_batch, which belongs to batch.

        Where gradients are enabled, a corruptor that trains has also run its backward pass when this returns. Equal
        micro batches of equal steps must give equal replacements, whatever rank asks.
        """


class MaskedText(Corruptor):
    """No corruption: what the masked text has at the masked positions stays, and main reads it as it is."""

    def propose(self, micro_batch: MicroBatch, batch: StepBatch, scale_loss: ScaleLoss) -> Proposal:
        return Proposal(micro_batch.masked_tokens.t().reshape(-1)[micro_batch.masked_index], {})
