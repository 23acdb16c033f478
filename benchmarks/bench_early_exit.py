"""Time whole optimizer steps with early exits against steps without, in turn, on the same weights and batches.

Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...); without
any, a small model that the CPU trains in a minute.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.rounds import RATIOS, Taken, compared, timed
from benchmarks.training import Plan, prepare_data
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config, DataConfig, EarlyExitConfig, ModelConfig, TrainConfig
from metro_megatron.errors import UserError
from metro_megatron.plan.flops import Amount, model_flops
from metro_megatron.train.launch import choose_device, import_megatron

if TYPE_CHECKING:
    from metro_megatron.train.step import Step
    from metro_megatron.train.trainer import Trainer

SMALL = Config(
    model=ModelConfig(
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=1024,
        num_layers=12,
        auxiliary_num_layers=2,
        vocab_size=1024,
        max_position_embeddings=128,
    ),
    early_exit=EarlyExitConfig(layers=[4, 8]),
    data=DataConfig(seq_length=128, micro_batch_tokens=1024),
    train=TrainConfig(global_batch_tokens=1024, precision="fp32"),
)
COLUMNS = (
    *("share", *RATIOS, "flops_ratio", "average_depth"),
    *("seconds_per_step", "rounds", "layers", "hidden_size", "num_layers", "seq_length", "precision"),
)


@dataclass(frozen=True)
class Options:
    """Which shares, how often, where to."""

    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Shares of a sample's tokens that have left behind the last exit."""
    rounds: Annotated[int, at_least(1)] = 12
    """Steps of every kind, one of each in turn."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/early_exit; none are written by default."""


def main(options: Options, others: list[str]) -> None:
    """Time whole optimizer steps with early exits against steps without, in turn, on the same weights and batches.

    Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...); without
    any, a small model that the CPU trains in a minute. A ratio is of two steps of one round: the median of wall times
    with its quartiles, and of the process's processor times, which other programs on the machine disturb less.
    """
    config = parse_config(others) if others else SMALL
    device = choose_device(config)
    if not config.early_exit.layers:
        raise UserError("early_exit.layers is empty; name the layers behind which tokens leave")
    if wrong := [share for share in options.shares if not 0 <= share < 1]:
        raise UserError(f"--shares {wrong[0]:g}: must be at least 0 and less than 1")
    with tempfile.TemporaryDirectory(prefix="bench_early_exit_") as folder:
        config = prepare_data(config, Plan(warm_up=1, steps=options.rounds), Path(folder))
        if found := problems(config, 1, device):
            raise UserError(found)
        command = ["python", "-m", "benchmarks.bench_early_exit", *sys.argv[1:]]
        output = Path(options.output) if options.output else None
        results = Results(output, provenance(torch.device(device), command), COLUMNS)
        for row in _rows(config, options, torch.device(device)):
            results.add(row)
    print(table(results.rows, COLUMNS[:8]))
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


def _rows(config: Config, options: Options, device: torch.device) -> list[Row]:
    import_megatron()
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.metrics import MetricSums
    from metro_megatron.train.trainer import Trainer

    trainer = Trainer(config, Corpus.open(config), device)
    steps = [_step(trainer, None), *(_step(trainer, share) for share in options.shares)]
    taken: list[list[Taken]] = [[] for _ in steps]
    depths = [0.0] * len(steps)
    slots = squares = 0.0
    data = trainer.corpus.training_data(trainer.layout)
    with closing(data.prefetch(0, 1 + options.rounds, 0)) as batches:
        for number, batch in enumerate(batches):
            for kind, step in enumerate(steps):
                metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
                one = timed(partial(step.train, batch, metrics), device)
                depths[kind] = metrics.reduce()["average_depth"]
                if number:  # the first round warms up
                    taken[kind].append(one)
            slots = sum(float(part.tokens.numel()) for part in batch.micro_batches)
            squares = sum(float(part.sample_lengths.double().square().sum()) for part in batch.micro_batches)
    trainer.close()
    amount = Amount(slots, squares)
    whole = model_flops(replace(config, early_exit=EarlyExitConfig()), amount)
    rows = []
    for share, own, depth in zip(options.shares, taken[1:], depths[1:], strict=True):
        shallow = replace(config, early_exit=replace(config.early_exit, share=share))
        rows.append(
            {
                "share": share,
                **compared(own, taken[0]),
                "flops_ratio": model_flops(shallow, amount) / whole,
                "average_depth": depth,
                "layers": " ".join(map(str, config.early_exit.layers)),
                "hidden_size": config.model.hidden_size,
                "num_layers": config.model.num_layers,
                "seq_length": config.data.seq_length,
                "precision": config.train.precision,
            }
        )
    return rows


def _step(trainer: Trainer, share: float | None) -> Step:
    """The trainer's step at a constant share; None: without exits and without their losses."""
    from metro_megatron.objective.early_exit import ExitDetection
    from metro_megatron.train.step import Step

    config, parts = trainer.config, trainer.parts
    if share is None:
        config = replace(config, early_exit=EarlyExitConfig())
        parts = replace(parts, terms=[term for term in parts.terms if not isinstance(term, ExitDetection)])
    else:
        config = replace(config, early_exit=replace(config.early_exit, share=share))
    return Step(config, trainer.layout, parts, trainer.homes, trainer.optimizer)


if __name__ == "__main__":
    run_tool(main)
