"""A few steps of a small run with another source of replacements, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from metro_megatron.config.schema import Config, CorruptionConfig
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.parity.small_run import Figures, run_steps, small_config, start, whole_weights

STEPS = 8


@dataclass
class Run:
    figures: list[Figures]
    modules: list[str]
    """Names of the shared modules."""
    trained: set[str]
    """First parts of the names of what has gradient buffers."""
    weights: dict[str, torch.Tensor]
    changed: list[float]
    """Share of the masked tokens of the first step that are not the original ones, per micro batch."""
    is_masked_text: bool


def record(trainer: Trainer) -> Run:
    """A first evaluation and STEPS steps of a trainer, which is closed."""
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    trainer.homes.fetch_parameters()
    corrupted = trainer.step.evaluate(batch, MetricSums(trainer.layout, trainer.parts.all_terms))
    pairs = list(zip(corrupted, batch.micro_batches, strict=True))
    figures, _ = run_steps(trainer, 0, STEPS)
    trainer.homes.fetch_parameters()
    wrapped = {name for name, ddp in trainer.homes.shared.items() if any(p.requires_grad for p in ddp.parameters())}
    run = Run(
        figures,
        list(trainer.pair.shared),
        wrapped | {"main"},
        whole_weights(trainer),
        [float((tokens != one.tokens).sum() / one.masked_index.numel()) for tokens, one in pairs if one.is_real.any()],
        all(torch.equal(tokens, one.masked_tokens) for tokens, one in pairs),
    )
    trainer.close()
    return run


def source_config(corruption: CorruptionConfig, **concerns: dict[str, Any]) -> Config:
    return small_config(corruption=vars(corruption), train={"train_steps": 50}, optimizer={"lr": 5e-3}, **concerns)


def train(configs: list[Config]) -> list[Run]:
    """On every rank: a run of each configuration."""
    return [record(start(config)) for config in configs]


def run(corruption: CorruptionConfig, ranks: int = 1, index_cache: str = "", **parallel: object) -> Run:
    """A run with this source."""
    config = source_config(corruption, data={"index_cache": index_cache}, parallel=parallel)
    return run_ranks(train, ranks, [config])[0][0]
