"""The shards of a run, opened and checked before any process group or GPU is touched."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from metro_megatron.cli.command_line import tool_command
from metro_megatron.config.problems import row_problems
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.blending import source_weights
from metro_megatron.data.identity import open_datasets
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.manifest import read_manifest
from metro_megatron.data.replacements import CacheFolder, CachePlan
from metro_megatron.data.samples import SampleIndex, cache_folder, sample_indices, training_index
from metro_megatron.data.shards import Shard
from metro_megatron.data.token_counts import cached_token_counts
from metro_megatron.data.vocabulary import vocabulary_problems
from metro_megatron.errors import UserError
from metro_megatron.probing.folder import ProbeTask, read_tasks
from metro_megatron.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from metro_megatron.parallel.layout import Layout

_MOST_EPOCHS = 1000

_QUICK = 1_000_000
"""Documents whose samples are found in seconds."""


@dataclass(frozen=True)
class Corpus:
    """Training shards and, where configured, held-out ones, with their samples."""

    config: Config
    train_shards: list[Shard]
    train_index: SampleIndex
    validation_shards: list[Shard]
    validation_index: SampleIndex | None
    phase_indices: list[SampleIndex] = field(default_factory=list)
    """Training samples of each of train.phases."""
    cache: CacheFolder | None = None
    """Replacements, where the run reads them."""
    filled_by: str = ""
    """Hash of the frozen model, or of the cache's plan, that fills the masks; a resumed run must find the same."""
    probe_tasks: tuple[ProbeTask, ...] = ()
    """What main's features are asked while it trains."""

    @classmethod
    def open(cls, config: Config) -> Corpus:
        """Open all shards and find their samples.

        Raises UserError for damaged shards, shards of several tokenizers, datasets that hold the same documents, a
        vocabulary that is not the model's, splits without a sample, and a folder of tasks that is none.
        """
        data, train = config.data, config.train
        tasks = tuple(read_tasks(Path(train.probe_tasks))) if train.probe_interval > 0 and train.probe_tasks else ()
        train_shards, validation = open_datasets(data.train, data.validation)
        problems = list(vocabulary_problems(config.model, train_shards[0].manifest))
        if problems:
            raise UserError(problems)
        train_index, validation_index = sample_indices(data, train_shards, validation)
        indices = [train_index]
        for phase in config.by_phase[1:]:
            known = next((one for one in indices if one.seq_length == phase.data.seq_length), None)
            indices.append(known or training_index(phase.data, train_shards))
        _refuse_weights(config, indices)
        found = cls(
            config, train_shards, train_index, validation or train_shards, validation_index, indices[1:],
            probe_tasks=tasks,
        )  # fmt: skip
        _ = found.word_starts  # raises
        return found

    @property
    def without_checksums(self) -> str | None:
        """What to say of datasets of earlier versions, whose ids are not compared while they are read."""
        shards = [*self.train_shards, *self.validation_shards]
        found = dict.fromkeys(shard.dataset for shard in shards if shard.checksums is None)
        if not found:
            return None
        command = f"{tool_command('inspect_data')} --add_checksums --dataset {shlex.join(found)}"
        return f"{', '.join(found)}: no checksums, so that damaged ids would be trained on; add some with {command}"

    def token_counts(self) -> NDArray[np.int64]:
        """How often each id is in the training shards [V]. Raises UserError as cached_token_counts."""
        folder = cache_folder(self.config.data.index_cache, self.config.data.train)
        return cached_token_counts(self.train_shards, self.config.model.vocab_size, folder)

    @property
    def has_validation(self) -> bool:
        return self.validation_index is not None

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.train_shards[0].tokenizer_path)

    @cached_property
    def word_starts(self) -> NDArray[np.bool_] | None:
        """[V] whether an id begins a word, where whole words are masked. Raises UserError where none says so."""
        if not self.config.objective.whole_word_masking:
            return None
        starts = Tokenizer.from_folder(self.tokenizer_folder).word_starts()
        if starts is None:
            raise UserError(
                f"objective.whole_word_masking is true, but the tokens of {self.tokenizer_folder} do not say where "
                "words begin (\u2581, \u0120 or ##); set it false, or preprocess with another tokenizer"
            )
        return starts

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of the training shards' ids, in order."""
        return [shard.sha256 for shard in self.train_shards]

    @property
    def index_fingerprint(self) -> list[str]:
        """Hashes of the training shards' units and documents, in order."""
        return [shard.index_sha256 for shard in self.train_shards]

    def changed_shards(self, data: Sequence[str], data_index: Sequence[str] | None) -> list[str]:
        """What differs from shards of these hashes of ids, and of units and documents, where they are known.

        One line for each, empty where nothing differs.
        """
        known = [("bin", list(data), self.fingerprint), ("idx", list(data_index or []), self.index_fingerprint)]
        names = [shard.prefix for shard in self.train_shards]
        if len(data) != len(names):
            return [f"{len(names):,} shards, were {len(data):,}"]
        if list(data) != self.fingerprint and sorted(data) == sorted(self.fingerprint):
            return ["the same shards in another order"]
        return [
            f"{name}.{ending} has SHA-256 {now[:12]}, was {before[:12]}"
            for ending, earlier, found in known
            for name, before, now in zip(names, earlier, found, strict=False)
            if before != now
        ]

    @property
    def evaluated_samples(self) -> int:
        """Held-out samples that every evaluation reads; 0 where the run has none."""
        train = self.config.train
        if self.validation_index is None or not train.eval_interval:
            return 0
        return min(train.eval_samples, len(self.validation_index))

    def cache_plan(self, frozen_model: str) -> CachePlan:
        """What cached replacements of this run depend on; frozen_model: the model's hash, empty if not known."""
        fraction, by = self.config.data.validation_fraction, self.config.data.held_out_by
        tokenizer, samples = self.train_shards[0].tokenizer_sha256, self.evaluated_samples
        if fraction and by == "content":  # which decides what is trained on, also where nothing is evaluated
            held_out = [str(fraction), by]
        elif samples:
            held_out = [str(fraction)] if fraction else [shard.sha256 for shard in self.validation_shards]
        else:
            held_out = []
        return CachePlan.of(self.config, tokenizer, self.fingerprint, held_out, samples, frozen_model)

    def with_cache(self, path: Path, frozen_model: str) -> Corpus:
        """The same with the replacements of a cache. Raises UserError naming all that makes it another run's."""
        cache = CacheFolder(path)
        for split in ("train", "validation"):  # refuses an unfinished one
            cache.reader(split)
        plan = cache.plan()
        found = ["it has no plan"] if plan is None else self.cache_plan(frozen_model).differences(plan)
        if found or plan is None:
            remedy = "give the cache of this run, or write one with tools/cache_corruption.py"
            raise UserError([*(f"corruption.cache {path}: {one}" for one in found), f"{path}: {remedy}"])
        return replace(self, cache=cache, filled_by=plan.sha256)

    @property
    def epochs(self) -> list[float]:
        """How often the run reads the training samples of each source; steps of so many tokens are taken to have as
        many samples as they have on average."""
        train, found = self.config.train, np.zeros(len(self.train_index.source_bounds) - 1)
        starts = [*self.config.phase_starts, train.train_steps]
        phases = zip(self.config.by_phase, [self.train_index, *self.phase_indices], pairwise(starts), strict=True)
        for phase, index, (start, end) in phases:
            size = train.global_batch_size or train.global_batch_tokens * len(index) / index.num_tokens
            sizes = np.diff(index.source_bounds)
            weights = np.array(source_weights(phase.data.weights, sizes.tolist(), may_rest=True))
            found += (end - start) * size * weights / weights.sum() / np.maximum(sizes, 1)
        return found.tolist()

    @property
    def advice(self) -> str | None:
        """What to change if the run reads samples absurdly often, or some never."""
        if not all(self.epochs):
            unread = [name for name, epochs in zip(self.config.data.train, self.epochs, strict=True) if not epochs]
            return f"{', '.join(unread)}: no phase reads it, its weights are all 0; give it one, or leave it out"
        most, source = max((epochs, number) for number, epochs in enumerate(self.epochs))
        if most <= _MOST_EPOCHS:
            return None
        bounds, names = self.train_index.source_bounds, self.config.data.train
        of = f" of {names[source]}" if len(names) > 1 else ""
        return (
            f"the run reads the {bounds[source + 1] - bounds[source]:,} samples{of} {most:,.0f} times: check "
            "data.train and weights, or lower train.train_steps or the batch"
        )

    @property
    def description(self) -> str:
        config, index = self.config, self.train_index
        train = config.train
        has_size = train.global_batch_size > 0
        batch = f"{train.global_batch_size:,} samples" if has_size else f"{train.global_batch_tokens:,} tokens"
        least, most = min(self.epochs), max(self.epochs)
        epochs = f"{most:,.2f}" if most - least < 0.01 else f"{least:,.2f} to {most:,.2f}"
        held_out = f", {len(self.validation_index)} samples held out" if self.validation_index else ""
        return (
            f"{len(index):,} samples with {index.num_tokens:,} tokens{held_out}; "
            f"{train.train_steps:,} steps of {batch}: {epochs} epochs"
        )

    def index_at(self, step: int) -> SampleIndex:
        """Training samples of a step, counted from 0."""
        return [self.train_index, *self.phase_indices][self.config.phase_at(step)]

    def training_data(self, layout: Layout, phase_begins: Sequence[int] = (0,)) -> PretrainingData:
        """This rank's batches for training; phase_begins as PretrainingData has them."""
        return self._data(self.train_index, self.train_shards, layout, "train", phase_begins)

    def samples_before(self, end: int, phase_begins: Sequence[int]) -> str:
        """See PretrainingData.hash_of_last, of training."""
        data = PretrainingData(
            self.train_index,
            self.train_shards,
            self.config,
            phase_indices=self.phase_indices,
            phase_begins=phase_begins,
        )
        return data.hash_of_last(end)

    def validation_data(self, layout: Layout) -> PretrainingData:
        """This rank's batches for evaluation."""
        assert self.validation_index is not None
        return self._data(self.validation_index, self.validation_shards, layout, "validation")

    def evaluation_batches(self, layout: Layout) -> Iterator[StepBatch]:
        """This rank's batches of one evaluation, the same at every call."""
        train, data = self.config.train, self.validation_data(layout)
        batch_size = train.global_batch_size or max(1, train.global_batch_tokens // self.config.data.seq_length)
        return data.evaluation_batches(self.evaluated_samples, batch_size)

    def _data(
        self,
        index: SampleIndex,
        shards: list[Shard],
        layout: Layout,
        split: Literal["train", "validation"],
        phase_begins: Sequence[int] = (0,),
    ) -> PretrainingData:
        return PretrainingData(
            index,
            shards,
            self.config,
            split=split,
            dp_rank=layout.data.rank(),
            dp_size=layout.data.size(),
            pin_memory=layout.device.type == "cuda",
            cache=self.cache.reader(split) if self.cache else None,
            word_starts=self.word_starts,
            phase_indices=self.phase_indices if split == "train" else (),
            phase_begins=phase_begins,
        )


def data_problems(config: Config) -> list[str]:
    """What is wrong with the data of a configuration that has other mistakes; not looked for in much of it.

    Samples of rows that no sample fits into are not made.
    """
    try:
        documents = sum(read_manifest(prefix).documents for prefix in [*config.data.train, *config.data.validation])
        if documents < _QUICK and not list(row_problems(config)):
            Corpus.open(config)
    except UserError as error:
        return error.problems
    return []


def _refuse_weights(config: Config, indices: Sequence[SampleIndex]) -> None:
    """Raise UserError with all that is wrong with the weights of the run and of its phases."""
    problems = []
    for number, (index, phase) in enumerate(zip(indices, config.by_phase, strict=True)):
        name = f"weights of phase {number} of train.phases" if number else "data.weights"
        weights = phase.data.weights
        if number and weights == config.data.weights:
            continue
        try:
            source_weights(weights, np.diff(index.source_bounds).tolist(), name, may_rest=len(indices) > 1)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
