"""What a run is watched by on its first rank: the lines so far, and which alarms have been said."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.samples import NUM_SAMPLE_SPECIALS
from metro_megatron.health.alarms import ALARMS, Alarm
from metro_megatron.health.history import History, Line, Masks
from metro_megatron.health.trivial import WordFrequencies
from metro_megatron.parallel.optim import Update
from metro_megatron.randomness import hash64

QUIET_LINES = 10
"""Lines without an alarm's signs after which it may be said again."""
MOST_LINES = 400
MOST_SAMPLES = 1 << 18
"""Samples whose contents are remembered, 8 bytes each and a set's room."""


@dataclass(frozen=True)
class Said:
    """An alarm that goes off."""

    alarm: Alarm
    evidence: str

    @property
    def text(self) -> str:
        return f"{self.alarm.name} ({self.evidence}): {self.alarm.cause}. {self.alarm.remedy[0].upper()}" + (
            f"{self.alarm.remedy[1:]}"
        )


class Watch:
    """Host work alone: no device is asked for anything here."""

    def __init__(self, config: Config):
        self.config = config
        self.frequencies = WordFrequencies(config.model.vocab_size)
        self.phase = 0
        self.lines: list[Line] = []
        self.read, self.numbers = _Read(), _Read()
        self.masked = self.tokens = 0
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.first: int | None = None
        self.masks = Masks()
        self.skipped = 0
        self.quiet: dict[str, int] = {}
        """By alarm that has been said: lines since its signs were last seen."""

    def batch(self, batch: StepBatch) -> None:
        """Look at what a step is about to read, while it is on the host."""
        self.first = batch.step if self.first is None else self.first
        phase = self.config.phase_at(batch.step)
        if phase != self.phase:  # its sources may have other words
            self.phase, self.frequencies = phase, WordFrequencies(self.config.model.vocab_size)
            self.numbers = _Read()  # it may cut other samples
        self.masked += batch.num_masked
        self.tokens += batch.num_tokens
        config = self.config.by_phase[phase]
        for micro_batch in batch.micro_batches:
            self.frequencies.add(micro_batch.masked_targets.numpy())
            self.read.add(sample_hashes(micro_batch))
            self.numbers.add(micro_batch.sample_ids[micro_batch.sample_ids >= 0].numpy())
            self.masks += masks_of(micro_batch, config)

    def update(self, update: Update) -> None:
        """Note what a step did."""
        self.norms.append(update.grad_norm)
        self.rates.append(update.learning_rate)
        self.skipped += update.is_skipped

    def line(
        self, step: int, figures: Mapping[str, float], weights: Mapping[str, tuple[float, int]], planned: float
    ) -> list[Said]:
        """The alarms that go off with this log line; each is said once, and again only after it was away.

        planned: share of the samples since the line before that earlier epochs had, too.
        """
        again = self.numbers.lap()
        self.lines.append(
            Line(
                step=step,
                figures=figures,
                masked=self.masked,
                tokens=self.tokens,
                norms=tuple(self.norms),
                skipped=self.skipped,
                unigram=self.frequencies.entropy(),
                repeated=self.read.lap() - planned,
                again=again if not planned else 0.0,
                first=self.first,
                rates=tuple(self.rates),
                masks=self.masks,
                weights=weights,
            )
        )
        if len(self.lines) > MOST_LINES:
            del self.lines[1]  # the first one says how weights began
        self.masked = self.tokens = self.skipped = 0
        self.norms, self.rates, self.masks, self.first = [], [], Masks(), None
        history = History(self.config, list(self.lines))
        said = []
        for alarm in ALARMS:
            evidence = alarm.sees(history)
            if evidence and alarm.name not in self.quiet:
                said.append(Said(alarm, evidence))
            if evidence:
                self.quiet[alarm.name] = 0
            elif alarm.name in self.quiet:
                self.quiet[alarm.name] += 1
                if self.quiet[alarm.name] >= QUIET_LINES:
                    del self.quiet[alarm.name]
        return said


class _Read:
    """Which samples have been read, by their contents or numbers."""

    def __init__(self) -> None:
        self.order: deque[int] = deque()
        self.known: set[int] = set()
        self.count = self.again = 0

    def add(self, samples: NDArray[np.integer]) -> None:
        for one in samples.tolist():
            self.count += 1
            if one in self.known:
                self.again += 1
                continue
            self.known.add(one)
            self.order.append(one)
            if len(self.order) > MOST_SAMPLES:
                self.known.discard(self.order.popleft())

    def lap(self) -> float:
        """Share of the samples since the last call that had been read before."""
        share = self.again / max(self.count, 1)
        self.count = self.again = 0
        return share


def masks_of(micro_batch: MicroBatch, config: Config) -> Masks:
    """How many masks there are, and where, beside what is expected (data/masking.py).

    Of l tokens as many as fit into floor(p (l + 2) + u), u uniform in [0, 1), are masked, every one as likely. Whole
    words may not fit, and special ids in the text are masked last: then there is nothing to say of either.
    """
    objective, others = config.objective, torch.tensor(config.model.special_ids.others)
    if objective.whole_word_masking or torch.isin(micro_batch.tokens, others).any():
        return Masks()
    lengths = micro_batch.sample_lengths.numpy()
    lengths = lengths[lengths > 0].astype(np.int64)
    content = lengths - NUM_SAMPLE_SPECIALS
    least = np.floor(objective.mask_probability * lengths)
    share = objective.mask_probability * lengths - least
    share[least >= content] = 0
    real = micro_batch.is_real
    masked = micro_batch.is_masked[real].numpy()
    middles = np.repeat((lengths - 1) / 2, lengths)
    variances = np.repeat((content**2 - 1) / 12, lengths)
    return Masks(
        count=float(masked.sum() - (np.minimum(least, content) + share).sum()),
        count_variance=float((share * (1 - share)).sum()),
        places=float((micro_batch.position_ids[real].numpy() - middles)[masked].sum()),
        places_variance=float(variances[masked].sum()),
    )


def sample_hashes(micro_batch: MicroBatch) -> NDArray[np.uint64]:
    """A hash of the contents of every sample, wherever it lies."""
    real = micro_batch.is_real.numpy().reshape(-1)
    tokens, positions = (
        tensor.numpy().reshape(-1)[real].astype(np.uint64) for tensor in (micro_batch.tokens, micro_batch.position_ids)
    )
    lengths = micro_batch.sample_lengths.numpy()
    lengths = lengths[lengths > 0]
    begins = np.cumsum(lengths) - lengths
    hashed = hash64(tokens, positions)
    return np.add.reduceat(hashed, begins) if len(begins) else np.empty(0, np.uint64)
