"""The seat of a loss: everything that the rest of the program asks of one.

The step, the metrics, the report, the picture, evaluation and the comparison with an exported model go through the
terms of a run; none of them knows a loss by name. A new loss is a file beside this one, a line in terms.py, its
options, and its head in the exported model.

Nothing here or in a term's file loads megatron-core: pictures and evaluation of exported models do without.

Legend: S positions, B rows, H hidden, D width of the token table, M masked positions, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.schedule import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from metro_megatron.model.encoder import Reading
    from metro_megatron.parallel.layout import Layout

Sums = dict[str, Tensor]
"""Numbers, or histograms, that add up over micro batches, ranks and steps."""


def mean(total: Tensor | float, count: Tensor | float) -> float:
    """What a sum is on average; NaN where there was nothing to sum, which a 0 would hide."""
    return float(total) / float(count) if float(count) else math.nan


def known_count(number: int, device: torch.device) -> Tensor:
    """A sum that the host knows. It is filled in on the device: a copy from the host would wait for it."""
    return torch.full((), number, device=device)


@dataclass(frozen=True)
class Panel:
    """One pair of axes in the picture of a run. Panels of one title, of several terms, are drawn as one."""

    title: str
    curves: Mapping[str, str]
    """What is drawn: name of the figure, and its label."""
    is_share: bool = False
    """Drawn from 0 to 1, instead of where the values lie."""


class Term(ABC):
    """One loss of a run. Its figure `{name}_loss` is what it adds to the whole loss, before its weight."""

    name: str
    """In figures, on the console, and of its head: `{name}_head`."""
    exported: ClassVar[str]
    """Name of its head's output in the exported model, `{exported}_logits`; empty if the head is not exported."""
    sums: Mapping[str, int]
    """Names and numbers of elements of the sums that `loss` returns."""
    console: ClassVar[Mapping[str, str]] = {}
    """What the console says beside the loss: label, and name of the figure."""
    validation_console: ClassVar[Mapping[str, str]] = {}
    """What it says after an evaluation only."""
    panels: ClassVar[tuple[Panel, ...]]
    layer: int | None = None
    """Number (1-based) of the main layer that the head sits behind; None: the last one, behind the encoder.

    With pre-LN, a head on a middle layer reads the residual stream itself, which only the last norm would norm.
    """

    num_distractors: ClassVar[int] = 0
    """How many ids other than the original it wants of the corruptor at every masked position (`View.distractors`)."""

    def __init__(self, config: Config):
        self.config = config

    @property
    def weight(self) -> Schedule:
        """Factor of this loss in the whole one, over the run."""
        return Schedule(1.0)

    def weight_at(self, step: int) -> float:
        """The factor in a step, counted from 0."""
        return self.weight.at(step, self.config.train.train_steps)

    @abstractmethod
    def head(self, config: TransformerConfig) -> nn.Module | None:
        """A new head, weights not yet set: called with (hidden [S, B, H], micro batch, token embedding [V, D]).

        None if the loss reads hidden states alone.
        """

    def second_view(self, view: View) -> View | None:
        """What main shall read beside `view`, made from it, of the same shape; no other term sees it."""
        return None

    def teaches(self, micro_batch: MicroBatch) -> bool:
        """Whether the loss of a micro batch that has masks depends on weights."""
        return True

    def least_read(self, batch: StepBatch) -> int:
        """How many of a step's states it reads at least: those of masked tokens."""
        return batch.num_masked

    @abstractmethod
    def denominator(self, batch: StepBatch) -> int:
        """Over what the loss is a mean, counted over the whole step; at least 1."""

    @abstractmethod
    def loss(self, reading: Reading, view: View, layout: Layout) -> tuple[Tensor, Sums]:
        """The sum over a micro batch, with its graph, and this term's sums.

        layout.tensor are the ranks that share the vocabulary; those of layout.data, if they call a collective, are at
        their micro batch of the same number.
        """

    def token_losses(self, reading: Reading, view: View, layout: Layout) -> Tensor | None:
        """[B, S] what each token adds to the loss, NaN where it adds nothing; None if the loss is not one of tokens."""
        return None

    @abstractmethod
    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means and rates of this term's sums and of objective.figures.counts: `{name}_loss` and others."""

    def exported_logits(self, model: nn.Module, hidden: Tensor, is_masked: Tensor) -> Tensor:
        """What an exported model's head says of the hidden states [B, S, H] of its encoder, where this loss looks."""
        raise NotImplementedError(f"{self.name} has no head in the exported model")

    def exported_sums(self, logits: Tensor, tokens: Tensor, originals: Tensor, is_masked: Tensor) -> Sums:
        """The scalars of `loss`'s sums from such logits; tokens [B, S] are corrupted, originals have padding behind
        their end."""
        raise NotImplementedError(f"{self.name} has no head in the exported model")

    def exported_histograms(self, logits: Tensor, tokens: Tensor, originals: Tensor) -> Sums:
        """Its other sums, of the same: too large to be made of every sample."""
        return {}


@contextmanager
def weighing(terms: Iterable[Term], change: Callable[[float], float]) -> Iterator[None]:
    """The terms have the weights that change makes of theirs."""
    before = [(term, vars(term).get("weight_at"), term.weight_at) for term in terms]
    for term, _, weight_at in before:
        vars(term)["weight_at"] = lambda step, weight_at=weight_at: change(weight_at(step))
    try:
        yield
    finally:
        for term, own, _ in before:
            del vars(term)["weight_at"]
            if own:
                vars(term)["weight_at"] = own
