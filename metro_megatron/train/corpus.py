"""The shards of a run, opened and checked before any process group or GPU is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metro_megatron.config import Config
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import SampleIndex, Split, build_sample_index
from metro_megatron.data.shards import Shard, open_shards
from metro_megatron.errors import UserError
from metro_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Corpus:
    """Training shards and, where configured, held-out ones, with their samples."""

    config: Config
    train_shards: list[Shard]
    train_index: SampleIndex
    validation_shards: list[Shard]
    validation_index: SampleIndex | None

    @classmethod
    def open(cls, config: Config) -> Corpus:
        """Open all shards and find their samples.

        Raises UserError for damaged shards, shards of several tokenizers, a vocabulary that is not the
        model's, and splits without a sample.
        """
        data = config.data
        shards = open_shards([*data.train, *data.validation])
        vocab_size = shards[0].manifest["vocab_size"]
        if vocab_size != config.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {config.model.vocab_size}, but the shards' tokenizer has {vocab_size} ids: "
                f"set model.vocab_size to {vocab_size}, or preprocess with another tokenizer"
            )
        train, validation = shards[: len(data.train)], shards[len(data.train) :]
        fraction = data.validation_fraction
        train_split: Split = "train" if fraction > 0.0 else "all"
        validation_index = None
        if validation:
            validation_index = build_sample_index(validation, data.seq_length, split="all")
        elif fraction > 0.0:
            validation = train
            validation_index = build_sample_index(train, data.seq_length, "validation", fraction)
        return cls(
            config,
            train,
            build_sample_index(train, data.seq_length, train_split, fraction),
            validation,
            validation_index,
        )

    @property
    def has_validation(self) -> bool:
        return self.validation_index is not None

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.train_shards[0].tokenizer_path)

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of the training shards' contents, in order."""
        return [shard.manifest["files"]["bin"]["sha256"] for shard in self.train_shards]

    @property
    def description(self) -> str:
        config, index = self.config, self.train_index
        epochs = config.train.train_steps * config.train.global_batch_size / len(index)
        held_out = f", {len(self.validation_index)} samples held out" if self.validation_index else ""
        return (
            f"{len(index):,} samples with {index.num_tokens:,} tokens{held_out}; "
            f"{config.train.train_steps:,} steps of {config.train.global_batch_size:,} samples: {epochs:.2f} epochs"
        )

    def training_data(self, layout: Layout) -> PretrainingData:
        """This rank's batches for training."""
        return self._data(self.train_index, self.train_shards, layout, "train")

    def validation_data(self, layout: Layout) -> PretrainingData:
        """This rank's batches for evaluation."""
        assert self.validation_index is not None
        return self._data(self.validation_index, self.validation_shards, layout, "validation")

    def _data(
        self, index: SampleIndex, shards: list[Shard], layout: Layout, split: Literal["train", "validation"]
    ) -> PretrainingData:
        parallel = self.config.parallel
        interleaved = parallel.virtual_pipeline_model_parallel_size > 1
        return PretrainingData(
            index,
            shards,
            self.config,
            split=split,
            dp_rank=layout.data.rank(),
            dp_size=layout.data.size(),
            micro_batch_multiple=parallel.pipeline_model_parallel_size if interleaved else 1,
            pin_memory=layout.device.type == "cuda",
        )
