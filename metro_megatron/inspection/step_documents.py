"""Which documents a step of a run has read: a lookup, as order and index say it without a batch being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metro_megatron.checkpoint.positions import known_position
from metro_megatron.config.file import load_config
from metro_megatron.data.samples import training_index
from metro_megatron.data.shards import open_shards
from metro_megatron.data.steps import RunSamples
from metro_megatron.errors import UserError


@dataclass(frozen=True)
class ReadSample:
    """A sample of a step: n consecutive tokens of a document."""

    step: int
    """Counted from 1, as metrics.jsonl does."""
    position: int
    """In the order of the run, from 0."""
    epoch: int
    """Pass over its dataset, from 0."""
    sample: int
    """Its number in the index."""
    dataset: str
    """Prefix."""
    source: str
    """Of those in the dataset."""
    document: int
    """Number in the dataset, from 0."""
    first_token: int
    """Number in the document, from 0."""
    tokens: int
    """n, without <s> and </s>."""
    ids: NDArray[np.integer] = field(repr=False)
    """[n] what is read between <s> and </s>, on the disk."""

    @property
    def record(self) -> dict[str, Any]:
        """All but the ids, as JSON has it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "ids"}


class RunOrder:
    """What a run reads, in order.

    Raises UserError if the folder holds no run, and as open_shards and training_index. An index that is not there is
    built.
    """

    def __init__(self, run: Path):
        self.run = run
        self.config_path = run / "run_config.yaml"
        if not self.config_path.is_file():
            raise UserError(f"{self.config_path}: no such file; give a run folder (train.output of pretrain_metro.py)")
        self.config = load_config(self.config_path)
        self._shards = open_shards(self.config.data.train)
        indices = [training_index(phase.data, self._shards) for phase in self.config.by_phase]
        self._samples = RunSamples(indices, self.config)

    @property
    def tokenizer_folder(self) -> Path:
        return self._shards[0].tokenizer_path

    def samples(
        self, first: int, last: int, on_step: Callable[[int], object] = lambda done: None
    ) -> Iterator[ReadSample]:
        """Those of the steps from first to last, both counted from 1, in order.

        Where a step is as many samples as fit, they are counted from the last step that the run has logged or saved on;
        `on_step` hears of each. Raises UserError for steps that are not of the run.
        """
        steps = self.config.train.train_steps
        outside = [step for step in dict.fromkeys((first, last)) if not 1 <= step <= steps]
        if outside:
            raise UserError([f"--step {step}: is not within 1 to train.train_steps {steps}" for step in outside])
        if first > last:
            raise UserError(f"--step {first} {last}: must ascend; swap them")
        position = self._samples.position(first - 1, lambda step: known_position(self.run, self.config, step), on_step)
        for step in range(first, last + 1):
            yield from self._of_step(step, position)
            position = self._samples.after(step - 1, position)

    def _of_step(self, step: int, first: int) -> Iterator[ReadSample]:
        phase = self._samples.phases[self._samples.at(step - 1, first)]
        index, draws = phase.index, phase.draws(first, phase.count(first))
        numbers, places = index.shard[draws.sample], index.start[draws.sample]
        documents, before = np.empty_like(places), np.empty_like(places)
        for number in np.unique(numbers):
            is_here = numbers == number
            documents[is_here], before[is_here] = self._shards[number].documents_of(places[is_here])
        lengths = index.length[draws.sample]
        for i in range(len(draws)):
            shard = self._shards[numbers[i]]
            manifest = shard.manifest
            yield ReadSample(
                step=step,
                position=first + i,
                epoch=int(draws.epoch[i]),
                sample=int(draws.sample[i]),
                dataset=shard.dataset,
                source=manifest.sources[manifest.source_of(int(documents[i]))].name,
                document=int(documents[i]),
                first_token=int(before[i]),
                tokens=int(lengths[i]),
                ids=shard.tokens[places[i] : places[i] + lengths[i]],
            )
