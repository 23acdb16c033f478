"""One small run in any layout: what the parity tests start on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metro_megatron import mcore
from metro_megatron.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.samples import build_sample_index
from metro_megatron.model.init import global_parameters, split_dimension
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer

VOCAB_SIZE = 300  # padded to 384 rows: ranks of tensor parallelism hold different numbers of real ones
STEPS = 6
Figures = dict[str, float]
Norms = tuple[float, float, float]


@dataclass(frozen=True)
class MemoryShard:
    """Random documents that need no file: [T] tokens, [U] unit lengths, [D + 1] document index."""

    tokens: np.ndarray
    unit_lengths: np.ndarray
    document_index: np.ndarray
    dataset: str = "memory"
    first_document: int = 0
    tokenizer_path: str = ""
    prefix: str = "memory"
    sha256: str = "memory"
    index_sha256: str = "memory"
    tokenizer_sha256: str = "memory"
    manifest: dict[str, Any] = field(default_factory=lambda: {"vocab_size": VOCAB_SIZE})
    checksums: None = None


def memory_shard(seed: int, num_documents: int = 200) -> MemoryShard:
    """Documents of 1 to 6 units of 1 to 40 tokens, and a long one; ids follow a skewed bigram rule to be learnable."""
    rng = np.random.default_rng(seed)
    units_per_document = rng.integers(1, 7, num_documents)
    unit_lengths = rng.integers(1, 41, units_per_document.sum()).astype(np.int32)
    unit_lengths[0] = 500
    steps = rng.integers(1, 5, unit_lengths.sum())
    tokens = 5 + np.cumsum(steps) % (VOCAB_SIZE - 5)
    index = np.concatenate([[0], np.cumsum(units_per_document)])
    return MemoryShard(tokens.astype(np.uint16), unit_lengths, index.astype(np.int64))


def edge_shard() -> MemoryShard:
    """Documents of 1, 45, 46 (seq_length - 2), 47 and 1,000 tokens, the last one as one unit and as many."""
    documents = [[1], [1], [45], [46], [47], [1000], [7] * 140, [1, 46, 1], [2], [1]] * 4
    lengths = np.array([length for units in documents for length in units], dtype=np.int32)
    tokens = 5 + np.arange(lengths.sum()) * 7 % (VOCAB_SIZE - 5)
    index = np.concatenate([[0], np.cumsum([len(units) for units in documents])])
    return MemoryShard(tokens.astype(np.uint16), lengths, index.astype(np.int64))


def small_config(**concerns: dict[str, Any]) -> Config:
    """A pair of 2 and 4 layers on rows of 128 tokens; keyword arguments override fields of a concern."""
    config = Config(
        model=ModelConfig(
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            num_layers=4,
            auxiliary_num_layers=2,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=64,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        data=DataConfig(train=["memory"], seq_length=48, micro_batch_tokens=128, micro_batch_size=3, prefetch_steps=1),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=2, clip_grad=1.0),
        parallel=ParallelConfig(timeout_minutes=2),
        checkpoint=CheckpointConfig(save_interval=1000),
        train=TrainConfig(
            train_steps=STEPS, global_batch_size=24, precision="fp32", device="cpu", log_interval=1, eval_interval=0
        ),
    )
    for concern, fields in concerns.items():
        config = replace(config, **{concern: replace(getattr(config, concern), **fields)})
    return config


def small_corpus(config: Config) -> Corpus:
    shard = edge_shard() if config.data.train == ["edge"] else memory_shard(seed=7)
    index, *of_phases = [build_sample_index([shard], phase.data.seq_length) for phase in config.by_phase]
    return Corpus(config, [shard], index, [], None, of_phases)


def random_vectors(trainer: Trainer) -> None:
    """Biases and norms start at random: constant ones hide mistakes in sequence parallelism."""
    with torch.no_grad():
        for prefix, module in trainer.pair.modules():
            for name, parameter in global_parameters(module, prefix):
                if parameter.dim() == 1 and split_dimension(parameter) is None:
                    generator = torch.Generator().manual_seed(sum(name.encode()))
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * drawn.to(parameter.device))
    for optimizer in (trainer.optimizer.shared, trainer.optimizer.stage):
        optimizer.reload_model_params()


def start(config: Config) -> Trainer:
    trainer = Trainer(config, small_corpus(config), torch.device(config.train.device))
    random_vectors(trainer)
    return trainer


@dataclass
class Record:
    """What one run showed."""

    figures: list[Figures]
    grad_norms: list[Norms]
    weights: dict[str, torch.Tensor]


def use_small_buckets() -> None:
    """Have megatron-core cut gradient buffers into many buckets, as it does with large models."""
    mcore.DistributedDataParallelConfig = partial(mcore.DistributedDataParallelConfig, bucket_size=4000)


def run_steps(trainer: Trainer, first: int, last: int) -> tuple[list[Figures], list[Norms]]:
    """Train steps first to last; figures of each and its gradient norms (both homes, shared, stage)."""
    data = trainer.corpus.training_data(trainer.layout)
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    figures: list[Figures] = []
    norms: list[Norms] = []
    for step in range(first, last):
        batch = data.step_batch(step, trainer.progress.seen_samples)
        update = trainer.step.train(batch, metrics).read()
        trainer.progress.seen_samples = batch.end
        assert not update.is_skipped
        figures.append(metrics.reduce())
        norms.append((update.grad_norm, update.shared_grad_norm, update.stage_grad_norm))
    return figures, norms


def train_in_layouts(configs: list[Config], steps: int = STEPS) -> list[Record]:
    """On every rank: train some steps of each configuration; the records hold whole weights by global name."""
    records = []
    for config in configs:
        trainer = start(config)
        figures, norms = run_steps(trainer, 0, steps)
        trainer.homes.fetch_parameters()
        records.append(Record(figures, norms, whole_weights(trainer)))
        trainer.close()
    return records


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter whole, on every rank; replicas must be equal bit for bit."""
    group = trainer.layout.tensor
    own: dict[str, torch.Tensor] = {}
    for prefix, module in trainer.pair.modules():
        for name, parameter in global_parameters(module, prefix):
            tensor = parameter.detach().contiguous()
            split = split_dimension(parameter)
            if split is not None:
                parts = [torch.empty_like(tensor) for _ in range(group.size())]
                dist.all_gather(parts, tensor, group=group)
                tensor = torch.cat(parts, split)
            own[name] = tensor.clone()
    everyone: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    merged: dict[str, torch.Tensor] = {}
    for weights in everyone:
        for name, tensor in weights.items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), f"replicas of {name} differ"
    return merged


def corrupted_samples(config: Config) -> dict[int, list[int]]:
    """On every rank: the corrupted ids of this data-parallel rank's samples in the first step, by sample id."""
    trainer = start(config)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    corrupted = trainer.step.evaluate(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    trainer.close()
    pairs = zip(corrupted, batch.micro_batches, strict=True)
    return dict(sample for tokens, micro_batch in pairs for sample in samples_of(tokens, micro_batch))


def samples_of(tokens: torch.Tensor, micro_batch: MicroBatch) -> list[tuple[int, list[int]]]:
    """(sample id, its ids) of every sample in a micro batch, packed or padded."""
    flat = tokens[micro_batch.is_real].tolist()
    samples, start_at = [], 0
    for sample, length in zip(micro_batch.sample_ids.tolist(), micro_batch.sample_lengths.tolist(), strict=True):
        if sample >= 0:
            samples.append((sample, flat[start_at : start_at + length]))
            start_at += length
    return samples
