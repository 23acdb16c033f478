"""Writes the replacements of a run with a frozen model before the run: what tools/cache_corruption.py does.

Every data-parallel rank draws for its own micro batches, as the run would; the first one writes. A part is finished
when its record is there, so that the same command continues after kill -9 at any moment; it compares finished parts
with their records, and draws those that are damaged again.

n samples, M masked positions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.config.schema import ParallelConfig
from metro_megatron.corruption.corruptor import sampling_at
from metro_megatron.corruption.frozen import Frozen, PaddedSamples
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.replacements import CONTENT, LOCK, PLAN, CacheContent, CacheFolder, CachePlan, Split
from metro_megatron.errors import UserError
from metro_megatron.files import locked, remove_partial
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.frozen_model import FrozenFolder

Drawn = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Global positions [n] of some samples, how many masked tokens each has [n], and their ids [M], in this order."""


@dataclass(frozen=True)
class Written:
    """What a cache holds."""

    steps: int
    samples: int
    validation_samples: int
    bytes: int


def write_cache(
    corpus: Corpus,
    device: torch.device,
    path: Path,
    steps_per_part: int,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Written:
    """Write, or complete, the cache of a run whose corruption is frozen; on_step hears of steps that are done.

    Raises UserError if the folder holds the cache of another run, or another process works in it.
    """
    config = replace(corpus.config, parallel=ParallelConfig(timeout_minutes=corpus.config.parallel.timeout_minutes))
    frozen = FrozenFolder(config.corruption.frozen_model)
    layout = Layout.create(config.parallel, device)
    try:
        writer = _Writer(
            replace(corpus, config=config), layout, Frozen(config, layout, frozen.load()), CacheFolder(path)
        )
        return writer.write(corpus.cache_plan(frozen.sha256), steps_per_part, on_step)
    finally:
        layout.destroy()


@dataclass(frozen=True)
class _Writer:
    corpus: Corpus
    layout: Layout
    corruptor: Frozen
    folder: CacheFolder

    def write(self, plan: CachePlan, steps_per_part: int, on_step: Callable[[int], object]) -> Written:
        if self.layout.rank != 0:
            return self._write(steps_per_part, on_step)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.folder.path / LOCK, wait=False):
                self._begin_or_continue(plan)
                return self._write(steps_per_part, on_step)
        except BlockingIOError as error:
            raise UserError(
                f"{self.folder.path}: another process works in it; wait for it, or choose another --output"
            ) from error

    def _begin_or_continue(self, plan: CachePlan) -> None:
        remove_partial(self.folder.path)
        before = self.folder.plan()
        if before is None:
            foreign = [one.name for one in self.folder.path.iterdir() if one.name != LOCK]
            if foreign:
                raise UserError(f"{self.folder.path} holds {foreign[0]!r}, but no cache; choose another --output")
            self.folder.write(PLAN, plan)
        elif before != plan:
            found = plan.differences(before) or ["the evaluations are others"]
            remedy = "choose another --output, or remove it"
            raise UserError([*(f"{self.folder.path}: {one}" for one in found), f"{self.folder.path}: {remedy}"])

    def _write(self, steps_per_part: int, on_step: Callable[[int], object]) -> Written:
        train = self.corpus.config.train
        data = self.corpus.training_data(self.layout)
        bounds = [0]
        for part, first in enumerate(range(0, train.train_steps, steps_per_part)):
            last = min(first + steps_per_part, train.train_steps)
            batches = data.prefetch(first, last, bounds[-1])
            bounds.append(bounds[-1] + self._part("train", part, batches, on_step))
            on_step(last)
        held_out = [0]
        if self.corpus.evaluated_samples:
            held_out.append(self._part("validation", 0, self.corpus.evaluation_batches(self.layout)))
        if self.layout.rank == 0:
            self.folder.write(CONTENT, CacheContent(tuple(bounds), tuple(held_out)))
        size = sum(one.stat().st_size for one in self.folder.path.glob("*.npy"))
        return Written(train.train_steps, bounds[-1], held_out[-1], size)

    def _part(
        self,
        split: Split,
        part: int,
        batches: Iterable[StepBatch],
        on_step: Callable[[int], object] = lambda steps: None,
    ) -> int:
        """Samples of a part, which is written if it was not."""
        known = self._agreed(self._samples_of_part(split, part) if self.layout.rank == 0 else None)
        if known is not None:
            return known
        counts, ids = [], []
        for batch in batches:
            _, own_counts, own_ids = self._gathered([self._drawn(one, batch, split) for one in batch.micro_batches])
            counts.append(own_counts)
            ids.append(own_ids)
            on_step(batch.step + 1)
        whole = np.concatenate(counts)
        if self.layout.rank == 0:
            vocab_size = self.corpus.config.model.vocab_size
            self.folder.write_part(split, part, np.concatenate(ids), whole, vocab_size)
        return len(whole)

    def _samples_of_part(self, split: Split, part: int) -> int | None:
        """None for a part that is to be drawn; of a damaged one it says so."""
        try:
            entry = self.folder.entry(split, part)
            problems = self.folder.damage(split, part, entry) if entry else []
        except UserError as error:
            entry, problems = None, error.problems
        for problem in problems:
            print(f"{problem}: now", file=sys.stderr, flush=True)
        return entry.samples if entry and not problems else None

    def _drawn(self, micro_batch: MicroBatch, batch: StepBatch, split: Split) -> Drawn:
        """By the frozen model, as the run would draw."""
        micro_batch = micro_batch.to(self.layout.device)
        step = batch.step if split == "train" else self.corpus.config.train.train_steps
        sampled = self.corruptor.fill(micro_batch, sampling_at(self.corpus.config, micro_batch, step)).sampled
        sample, position = PaddedSamples.of(micro_batch, self.corpus.config.model.pad_token_id).masked
        assert micro_batch.sample_places is not None
        places = micro_batch.sample_places[micro_batch.sample_places >= 0]
        order = (sample << 32 | position).argsort()
        counts = torch.bincount(sample, minlength=len(places))
        return _array(places), _array(counts), _array(sampled[order])

    def _gathered(self, own: list[Drawn]) -> Drawn:
        """Of all ranks' micro batches, in the run's order."""
        everyone: list[list[Drawn]] = [[]] * self.layout.world.size()
        dist.all_gather_object(everyone, own, group=self.layout.world)
        drawn = [one for rank in everyone for one in rank]
        places, counts, ids = (np.concatenate(column) for column in zip(*drawn, strict=True))
        order = np.argsort(places)
        begins = np.cumsum(counts) - counts
        starts, lengths = begins[order], counts[order]
        # Ids of the samples in their order: each sample's own, counted from where it begins.
        within = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return places[order], lengths, ids[np.repeat(starts, lengths) + within]

    def _agreed(self, known: int | None) -> int | None:
        """What the first rank knows."""
        everyone: list[int | None] = [None] * self.layout.world.size()
        dist.all_gather_object(everyone, known, group=self.layout.world)
        return everyone[0]


def _array(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.cpu().numpy()
