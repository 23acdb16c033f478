"""What is looked at before a run starts: the run's own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Corruptor, Proposal
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.model.encoder import Pair
from metro_megatron.objective.term import Sums, Term
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer


class Reduced(Protocol):
    """Sums over micro batches and ranks (train/metrics.py)."""

    def add(self, many: Sequence[Sums]) -> None: ...

    def reduce(self) -> dict[str, float]: ...


class Phases(Protocol):
    """The step, phase by phase (train/step.py); metrics are what `Subject.new_sums` makes."""

    def on_device(self, batch: StepBatch) -> list[MicroBatch]: ...

    def gradients(self, batch: StepBatch, metrics: Any) -> list[View]: ...

    def propose(self, micro_batches: list[MicroBatch], batch: StepBatch, metrics: Any) -> list[Proposal]: ...

    def exchange(self, micro_batches: list[MicroBatch], proposals: list[Proposal]) -> list[View]: ...

    def read(self, views: list[View], batch: StepBatch, metrics: Any) -> None: ...


@dataclass(frozen=True)
class Subject:
    """One rank's part of a run."""

    config: Config
    layout: Layout
    pair: Pair
    corruptor: Corruptor
    terms: list[Term]
    """Of main."""
    homes: Homes
    optimizer: Optimizer
    step: Phases
    new_sums: Callable[[], Reduced]

    @property
    def all_terms(self) -> list[Term]:
        return [*self.corruptor.terms, *self.terms]

    @contextmanager
    def configured(self, **options: Any) -> Iterator[None]:
        """With other options of megatron-core's in both models."""
        configs = [module.config for _, module in self.pair.modules()]
        before = [{name: getattr(config, name) for name in options} for config in configs]
        for config in configs:
            vars(config).update(options)
        try:
            yield
        finally:
            for config, own in zip(configs, before, strict=True):
                vars(config).update(own)
