"""Time whole optimizer steps by what fills the masks, in turn, on the same batches, and count FLOPs and memory.

Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...); without
any, a small model in the proportions of base that the CPU trains in a minute.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.rounds import RATIOS, Taken, compared, timed
from benchmarks.synthetic_shards import write_synthetic_dataset
from benchmarks.training import MOST_SYNTHETIC_TOKENS
from fused.dispatch import reference_only
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from metro_megatron.errors import UserError
from metro_megatron.plan.flops import Amount, done_flops, model_flops, works
from metro_megatron.plan.memory import alone, run_memory
from metro_megatron.plan.report import PAPER
from metro_megatron.train.launch import choose_device, import_megatron

if TYPE_CHECKING:
    from metro_megatron.data.batch import StepBatch
    from metro_megatron.parallel.homes import Homes
    from metro_megatron.parallel.layout import Layout
    from metro_megatron.parallel.optim import Optimizer
    from metro_megatron.train.build import Parts
    from metro_megatron.train.corpus import Corpus

SMALL = Config(
    model=ModelConfig(
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=1024,
        num_layers=6,
        auxiliary_num_layers=2,
        vocab_size=20480,
        max_position_embeddings=128,
    ),
    data=DataConfig(seq_length=128, micro_batch_tokens=1024),
    train=TrainConfig(global_batch_tokens=1024, precision="fp32"),
)
"""An auxiliary of a third of main's layers, and heads half as expensive as it, as in base."""
ZERO, TWO_PASSES, FROZEN, CACHED = ARMS = ("auxiliary", "auxiliary, two passes", "frozen", "cached")
"""METRO's zero-dropout; COCO-LM's pass with dropout and one without, Fast-ELECTRA's baseline; Fast-ELECTRA."""
SHOWN = (
    *("arm", *RATIOS, "flops_saved_percent", "of_two_passes_percent", "paper_flops"),
    *("states_saved_percent", "paper_memory"),
)
COUNTED = ("gflop_counted", "gflop_planned")
COLUMNS = (
    *SHOWN,
    *(*COUNTED, "model_gflop", "weights_mb", "gradients_mb", "optimizer_mb", "planned_mb"),
    *("seconds_per_step", "rounds", "tokens", "hidden_size", "num_layers", "auxiliary_num_layers", "vocab_size"),
    *("seq_length", "precision"),
)


@dataclass(frozen=True)
class Options:
    """How often, where to."""

    rounds: Annotated[int, at_least(1)] = 12
    """Steps of every kind, one of each in turn."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/fast_electra; none are written by default."""


def main(options: Options, others: list[str]) -> None:
    """Time whole optimizer steps by what fills the masks, in turn, on the same batches, and count FLOPs and memory.

    Options that are not listed here are those of pretrain_metro.py (--config YAML..., --section.name VALUE...); without
    any, a small model in the proportions of base that the CPU trains in a minute. Without --data.train, every sample
    has data.seq_length tokens. The frozen model is the trained auxiliary as it begins; the cache is of its draws.
    """
    config = parse_config(others) if others else SMALL
    device = choose_device(config)
    if config.corruption.source != ZERO:
        raise UserError(f"corruption.source is {config.corruption.source}; leave it out, every arm sets its own")
    with tempfile.TemporaryDirectory(prefix="bench_fast_electra_") as name:
        folder = Path(name)
        configs = arm_configs(_prepared(config, options.rounds, folder), folder)
        found = [problem for one in configs.values() for problem in problems(one, 1, device)]
        if found:
            raise UserError(list(dict.fromkeys(found)))
        command = ["python", "-m", "benchmarks.bench_fast_electra", *sys.argv[1:]]
        output = Path(options.output) if options.output else None
        results = Results(output, provenance(torch.device(device), command), COLUMNS)
        for row in _rows(configs, options.rounds, torch.device(device)):
            results.add(row)
    print(table(results.rows, (*SHOWN, *COUNTED)))
    print(
        "saved: of the first arm, of_two_passes: of the second; counted: with logits that references compute again;\n"
        "paper: what Fast-ELECTRA is said to save at base size of a trained auxiliary, activations included"
    )
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


def arm_configs(config: Config, folder: Path) -> dict[str, Config]:
    """The configuration of each arm; the frozen model's run and the cache are in `folder`."""

    def arm(source: str, dropout: str = "zero", **paths: str) -> Config:
        model = replace(config.model, auxiliary_dropout=dropout)  # type: ignore[arg-type]
        corruption = replace(config.corruption, source=source, **paths)  # type: ignore[arg-type]
        return replace(config, model=model, corruption=corruption)

    return {
        ZERO: arm("auxiliary"),
        TWO_PASSES: arm("auxiliary", "eval"),
        FROZEN: arm("frozen", frozen_model=config.train.output),
        CACHED: arm("cached", cache=str(folder / "cache")),
    }


def _prepared(config: Config, rounds: int, folder: Path) -> Config:
    """A run of a warm-up and the rounds, without evaluation, on its own shards or on random ones in `folder`."""
    data, steps = replace(config.data, validation=[], validation_fraction=0.0), 1 + rounds
    if not data.train:
        prefix, length = folder / "synthetic", data.seq_length
        tokens = steps * (config.train.global_batch_size * length or config.train.global_batch_tokens)
        write_synthetic_dataset(prefix, min(tokens, MOST_SYNTHETIC_TOKENS), config.model.vocab_size, length - 2)
        data = replace(data, train=[str(prefix)])
    train = replace(config.train, train_steps=steps, output=str(folder / "run"))
    return replace(config, data=data, train=train, optimizer=replace(config.optimizer, lr_warmup_steps=0))


class Arm:
    """A run's step, in a layout that the other arms share."""

    def __init__(self, config: Config, layout: Layout, corpus: Corpus):
        from metro_megatron.model.encoder import TIED
        from metro_megatron.parallel.homes import Homes
        from metro_megatron.parallel.optim import Optimizer
        from metro_megatron.train.build import Parts
        from metro_megatron.train.step import Step

        self.config, self.layout = config, layout
        self.parts: Parts = Parts.build(config, layout, corpus)
        pair = self.parts.pair
        self.homes: Homes = Homes.build(config, layout, pair.shared, pair.main, both_phases=TIED)
        self.optimizer: Optimizer = Optimizer(config, self.homes)
        self.step = Step(config, layout, self.parts, self.homes, self.optimizer)
        self.taken: list[Taken] = []

    def train(self, batch: StepBatch) -> None:
        """One step."""
        from metro_megatron.train.metrics import MetricSums

        update = self.step.train(batch, MetricSums(self.layout, self.parts.all_terms)).read()
        if update.is_skipped:
            raise RuntimeError(f"step {batch.step} had gradients that are not finite (norm {update.grad_norm})")

    def flops(self, batch: StepBatch) -> Row:
        """Of one step, which is done in plain products: torch's counter does not look into kernels."""
        with reference_only(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.train(batch)
        objective = replace(self.config.objective, mask_probability=batch.num_masked / batch.num_tokens)
        config = replace(self.config, objective=objective)
        samples = sum(int((one.sample_lengths > 0).sum()) for one in batch.micro_batches)
        amount = Amount(batch.num_tokens, batch.num_squares, samples, len(batch.micro_batches))
        planned = done_flops(config, amount)
        if config.corruption.source == "frozen" or config.model.auxiliary_dropout == "eval":
            # Where there is no backward pass, references compute logits a second time, and kernels do not.
            planned += sum(one.forward(amount) for one in works(config) if one.name == "auxiliary head, decoder")
        return {
            "gflop_counted": counter.get_total_flops() / 1e9,
            "gflop_planned": planned / 1e9,
            "model_gflop": model_flops(config, amount) / 1e9,
            "tokens": batch.num_tokens,
        }

    def states(self) -> Row:
        """MB of the buffers that stay from step to step."""
        buffers = [buffer for ddp in self.homes.all for buffer in ddp.buffers]
        optimizer = 0
        for one in (self.optimizer.shared.optimizer, self.optimizer.stage.optimizer):
            for parameter, moments in one.state.items():
                optimizer += moments["exp_avg"].nbytes + moments["exp_avg_sq"].nbytes
                # FP32 weights are their own masters, counted there.
                optimizer += parameter.nbytes if self.config.train.precision != "fp32" else 0
        return {
            "weights_mb": (sum(one.param_data.nbytes for one in buffers) + self._frozen_bytes()) / 1e6,
            "gradients_mb": sum(one.grad_data.nbytes for one in buffers) / 1e6,
            "optimizer_mb": optimizer / 1e6,
            "planned_mb": run_memory(alone(self.config), 1).states / 1e6,
        }

    def _frozen_bytes(self) -> int:
        from metro_megatron.corruption.frozen import Frozen

        corruptor = self.parts.corruptor
        if not isinstance(corruptor, Frozen):
            return 0
        tensors = [*corruptor.model.parameters(), *(one for one in corruptor.output_layer if one is not None)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _rows(configs: dict[str, Config], rounds: int, device: torch.device) -> list[Row]:
    import_megatron()
    from metro_megatron.parallel.layout import Layout

    _write_frozen_model(configs[ZERO], device)
    corpus = _cached_corpus(configs, device)
    layout = Layout.create(configs[ZERO].parallel, device)
    arms = [Arm(config, layout, corpus) for config in configs.values()]
    with closing(corpus.training_data(layout).prefetch(0, 1 + rounds, 0)) as batches:
        first = next(batches)  # it warms up
        rows = [arm.flops(first) | arm.states() for arm in arms]
        for batch in batches:
            for arm in arms:
                arm.taken.append(timed(partial(arm.train, batch), device))
    layout.destroy()
    return [
        _finished(name, row, rows, compared(arm.taken, arms[0].taken), arm.config)
        for name, arm, row in zip(configs, arms, rows, strict=True)
    ]


def _write_frozen_model(config: Config, device: torch.device) -> None:
    """A checkpoint of a run before its first step."""
    from metro_megatron.train.corpus import Corpus
    from metro_megatron.train.trainer import Trainer

    Path(config.train.output).mkdir()
    trainer = Trainer(config, Corpus.open(config), device)
    trainer.save()
    trainer.close()


def _cached_corpus(configs: dict[str, Config], device: torch.device) -> Corpus:
    """With the frozen arm's replacements, which the other arms do not look at."""
    from metro_megatron.train.cache import write_cache
    from metro_megatron.train.corpus import Corpus

    config, path = configs[CACHED], Path(configs[CACHED].corruption.cache)
    write_cache(Corpus.open(configs[FROZEN]), device, path, config.train.train_steps)
    return Corpus.open(config).with_cache(path, "")


def _finished(name: str, row: Row, rows: list[Row], ratios: Row, config: Config) -> Row:
    """A row beside the first two arms' and the paper's."""
    first, twice = rows[:2]
    model, paper = config.model, PAPER.get(config.corruption.source, {"flops": "", "memory": ""})
    return {
        "arm": name,
        **ratios,
        "flops_saved_percent": _saved(row, first, "model_gflop"),
        "of_two_passes_percent": _saved(row, twice, "model_gflop"),
        "paper_flops": paper["flops"],
        "states_saved_percent": _saved(row, first, "weights_mb", "gradients_mb", "optimizer_mb"),
        "paper_memory": paper["memory"],
        **row,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "auxiliary_num_layers": model.auxiliary_num_layers,
        "vocab_size": model.vocab_size,
        "seq_length": config.data.seq_length,
        "precision": config.train.precision,
    }


def _saved(row: Row, other: Row, *columns: str) -> float:
    return 100 * (1 - sum(row[one] for one in columns) / sum(other[one] for one in columns))


if __name__ == "__main__":
    run_tool(main)
