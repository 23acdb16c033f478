"""Whole optimizer steps on the CPU beside those of the same pair in plain torch, in turn, on the same samples."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.isolation import Worker
from benchmarks.plain_pair import PaddedBatch, PlainPair, optimizer_of, train_step
from benchmarks.processes import ROOT
from benchmarks.provenance import provenance
from benchmarks.results import Results, Row, table
from benchmarks.rounds import RATIOS, Taken, compared, timed
from benchmarks.training import Plan, prepare_data
from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.config.file import parse_config
from metro_megatron.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from metro_megatron.train.launch import import_megatron

if TYPE_CHECKING:
    from metro_megatron.data.batch import StepBatch

CPU = torch.device("cpu")
MANY = 8
"""Batches, over and over: as many steps as that are read before the first."""
PATIENCE_S = 600.0
COLUMNS = ("size", "program", "processes", "threads", "tokens_per_s", *RATIOS, "seconds_per_step", "rounds")


def demo() -> Config:
    """examples/demo.yaml with the vocabulary of `make demo`; a step is 16 samples of up to 64 tokens where it has 8,
    and as there each of two processes has one micro batch."""
    config = parse_config(["--config", str(ROOT / "examples" / "demo.yaml"), "--model.vocab_size", "4096"])
    tokens = 16 * config.data.seq_length
    data = replace(config.data, micro_batch_tokens=tokens // 2)
    return replace(config, data=data, train=replace(config.train, global_batch_size=0, global_batch_tokens=tokens))


def larger() -> Config:
    """METRO's dropout; two micro batches of 2,048 tokens."""
    return Config(
        model=ModelConfig(
            hidden_size=384,
            num_attention_heads=6,
            ffn_hidden_size=1536,
            num_layers=6,
            auxiliary_num_layers=2,
            vocab_size=32000,
            max_position_embeddings=256,
        ),
        data=DataConfig(seq_length=256, micro_batch_tokens=2048),
        train=TrainConfig(global_batch_tokens=4096, precision="fp32", device="cpu"),
    )


SIZES: dict[str, Callable[[], Config]] = {"demo": demo, "larger": larger}


class Kind(NamedTuple):
    """Who does the steps, and with what."""

    program: Literal["plain", "ours"]
    processes: int
    threads: int
    """Of each process."""


KINDS = (
    *(Kind("plain", 1, 1), Kind("ours", 1, 1), Kind("plain", 1, 2), Kind("ours", 1, 2)),
    *(Kind("plain", 2, 1), Kind("ours", 2, 1)),
)
"""Of several processes the plain pair is in one DDP, ours in two homes."""


@dataclass(frozen=True)
class Options:
    """Which sizes, how often, where to."""

    sizes: list[Literal["demo", "larger"]] = field(default_factory=lambda: ["demo", "larger"])
    """demo: the pair of examples/demo.yaml; larger: 6 and 2 layers of 384, 32,000 ids."""
    rounds: Annotated[int, at_least(1)] = 12
    """Steps of every kind, one of each in turn."""
    cores: Annotated[int, at_least(1)] = 2
    """Kinds with more threads in all are left out."""
    output: str = ""
    """Results without ending, such as docs/benchmarks/cpu; none are written by default."""


def main(options: Options) -> None:
    """Whole optimizer steps on the CPU beside those of the same pair in plain torch, in turn, on the same samples.

    A ratio is of two steps of one round, to the plain pair's with as many processes and threads: the median of wall
    times with its quartiles, and of processor times, which other programs on the machine disturb less. Below 1 is
    faster than plain torch, in two processes with torch's DDP.
    """
    kinds = [kind for kind in KINDS if kind.processes * kind.threads <= options.cores]
    output = Path(options.output) if options.output else None
    command = ["python", "-m", "benchmarks.bench_cpu", *sys.argv[1:]]
    results = Results(output, provenance(CPU, command), COLUMNS)
    for name in options.sizes:
        with tempfile.TemporaryDirectory(prefix="bench_cpu_") as folder:
            for row in _rows(SIZES[name](), kinds, options.rounds, Path(folder)):
                results.add({"size": name, **row})
    print(table(results.rows, COLUMNS))
    print(f"wrote {output}.json and {output}.csv" if output else "nothing was written (--output)")


def _rows(config: Config, kinds: list[Kind], rounds: int, folder: Path) -> list[Row]:
    config = replace(config, data=replace(config.data, train=[], validation=[]))
    config = prepare_data(config, Plan(warm_up=0, steps=MANY), folder)
    with _steps(config, kinds, folder) as steps:
        taken: dict[Kind, list[Taken]] = {kind: [] for kind in kinds}
        for number in range(1 + rounds):
            for kind in kinds if number % 2 else reversed(kinds):  # no kind has always the same one before it
                one = steps.take(kind, number % MANY)
                if number:  # the first round warms up
                    taken[kind].append(one)
        tokens = sum(steps.ours.batches[number % MANY].num_tokens for number in range(1, 1 + rounds)) / rounds
    rows = []
    for kind in kinds:
        row = compared(taken[kind], taken[kind._replace(program="plain")])
        rows.append({**kind._asdict(), "tokens_per_s": tokens / row["seconds_per_step"], **row})
    return rows


class Ours:
    """The trainer's step, with its batches read."""

    def __init__(self, config: Config):
        import_megatron()
        from metro_megatron.train.corpus import Corpus
        from metro_megatron.train.metrics import MetricSums
        from metro_megatron.train.trainer import Trainer

        self.trainer = Trainer(config, Corpus.open(config), CPU)
        self.metrics = MetricSums(self.trainer.layout, self.trainer.parts.all_terms)
        data = self.trainer.corpus.training_data(self.trainer.layout)
        self.batches: list[StepBatch] = list(data.prefetch(0, MANY, 0))

    def step(self, number: int) -> Taken:
        """Of the batch of a number."""
        return timed(partial(self.trainer.step.train, self.batches[number], self.metrics), CPU)


class Plain:
    """The plain pair's step, on the same micro batches as padded ones."""

    def __init__(self, config: Config, batches: list[StepBatch]):
        self.config = config
        pair = PlainPair(config.model)
        self.optimizer = optimizer_of(pair, config)
        self.pair = DistributedDataParallel(pair) if dist.get_world_size() > 1 else pair
        self.batches = [[PaddedBatch.of(one) for one in batch.micro_batches] for batch in batches]

    def step(self, number: int) -> Taken:
        """Of the batch of a number."""
        return timed(partial(train_step, self.pair, self.optimizer, self.config, self.batches[number]), CPU)


@dataclass(frozen=True)
class _Steps:
    ours: Ours
    plain: Plain
    ranks: list[Worker]
    """Both, one process each."""

    def take(self, kind: Kind, number: int) -> Taken:
        """One step."""
        if kind.processes > 1:
            with ThreadPoolExecutor(len(self.ranks)) as threads:
                taken = list(threads.map(lambda worker: worker.ask((kind.program, number), PATIENCE_S), self.ranks))
            return Taken(max(one.seconds for one in taken), sum(one.processor for one in taken))
        torch.set_num_threads(kind.threads)
        return (self.plain if kind.program == "plain" else self.ours).step(number)


@contextmanager
def _steps(config: Config, kinds: list[Kind], folder: Path) -> Iterator[_Steps]:
    """Everything that does steps of a configuration, whose micro batches one process has alone."""
    most = max(kind.processes for kind in kinds)
    # One process has a whole step of the demo in one micro batch; several share it.
    places = min(config.data.micro_batch_tokens * most, config.train.global_batch_tokens, 2048)
    alone = replace(config, data=replace(config.data, micro_batch_tokens=places))
    ranks = [Worker(_rank, config, rank, most, folder) for rank in range(most)] if most > 1 else []
    ours = Ours(alone)
    try:
        yield _Steps(ours, Plain(alone, ours.batches), ranks)
    finally:
        for worker in ranks:
            worker.close()
        ours.trainer.close()


def _rank(config: Config, rank: int, processes: int, folder: Path) -> Callable[[tuple[str, int]], Taken]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=processes)
    ours = Ours(config)
    programs: dict[str, Ours | Plain] = {"ours": ours, "plain": Plain(config, ours.batches)}
    return lambda question: programs[question[0]].step(question[1])


if __name__ == "__main__":
    run_tool(main)
