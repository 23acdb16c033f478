"""Whole optimizer steps of a configuration, timed through the trainer's own step, loader and optimizer."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from benchmarks.clock import Clock, measure_ceilings
from benchmarks.results import Row
from benchmarks.step_profile import profile_steps
from benchmarks.synthetic_shards import write_synthetic_dataset
from fused.dispatch import OPERATOR_NAMES, reference_only
from metro_megatron.config.schema import Config
from metro_megatron.plan.flops import Amount, achieved_tflops, model_flops
from metro_megatron.plan.memory import state_bytes
from metro_megatron.train.launch import import_megatron

if TYPE_CHECKING:
    from metro_megatron.data.batch import StepBatch
    from metro_megatron.train.trainer import Trainer

RowFormat = Literal["packed", "padded"]
FUSED, TORCH = "all", "torch"
CHOICES = (TORCH, *OPERATOR_NAMES, FUSED)
"""Which operators are ours, in the order of the paper's Table 5: none but torch's own, one alone, all."""
PROFILED_STEPS = 2
MOST_SYNTHETIC_TOKENS = 20_000_000
TIME_UP = "not run: the time was up (--budget_s)"
STATE_SHARE = 0.6
"""Of the device's memory: above it, activations are recomputed."""


@dataclass(frozen=True)
class Plan:
    """How every row is measured."""

    micro_batches: int = 8
    """Of a step and data-parallel rank."""
    warm_up: int = 3
    steps: int = 10
    processes: int = 1


@dataclass(frozen=True)
class StepRow:
    """What a row measures."""

    layout: RowFormat
    fused: str = FUSED
    """One of CHOICES."""
    seconds: float = 60.0
    """After which no further step begins."""
    trace: str = ""
    """File to profile into, after the row."""


def bench_config(
    config: Config, micro_batches: int, world_size: int, memory_bytes: float | None
) -> tuple[Config, list[str]]:
    """The configuration with steps of micro_batches, and every option that was changed for the machine.

    A preset for more processes than there are loses its model parallelism, and on one process with less memory than
    its state leaves room for, activations are recomputed. Packed and padded micro batches get the same places.
    """
    changes: list[str] = []
    parallel = config.parallel
    if world_size % parallel.model_ranks:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
        parallel = replace(
            parallel,
            sequence_parallel=False,
            pipeline_model_parallel_layout="",
            **dict.fromkeys(sizes, 1),  # type: ignore[arg-type]
        )
        changes += [f"--parallel.{name} 1" for name in sizes if getattr(config.parallel, name) != 1]
        layout = "pipeline_model_parallel_layout"
        changes += [f"--parallel.{layout}="] if getattr(config.parallel, layout) else []
        changes += ["--parallel.sequence_parallel false"] if config.parallel.sequence_parallel else []
    is_tight = memory_bytes is not None and state_bytes(config) > STATE_SHARE * memory_bytes
    if world_size == 1 and is_tight and parallel.recompute == "none":
        parallel = replace(parallel, recompute="full")
        changes.append("--parallel.recompute full")
    rows = max(1, config.data.micro_batch_tokens // config.data.seq_length)
    places = rows * config.data.seq_length
    if places != config.data.micro_batch_tokens:
        changes.append(f"--data.micro_batch_tokens {places}")
    data = replace(
        config.data, micro_batch_tokens=places, micro_batch_size=rows, validation=[], validation_fraction=0.0
    )
    # A hundredth of the places stays free, without which samples would not fit into so few packed micro batches.
    tokens = 99 * places * micro_batches * (world_size // parallel.model_ranks) // 100
    train = replace(config.train, global_batch_size=0, global_batch_tokens=tokens)
    return replace(config, parallel=parallel, data=data, train=train), changes


def prepare_data(config: Config, plan: Plan, folder: Path) -> Config:
    """The configuration on its own shards, or on synthetic ones in `folder`; with a run folder there."""
    data = config.data
    if not data.train:
        prefix = folder / "synthetic"
        tokens = (plan.warm_up + plan.steps + PROFILED_STEPS) * config.train.global_batch_tokens
        write_synthetic_dataset(prefix, min(tokens, MOST_SYNTHETIC_TOKENS), config.model.vocab_size)
        data = replace(data, train=[str(prefix)])
    return replace(config, data=data, train=replace(config.train, output=str(folder / "run")))


@dataclass
class _Totals:
    """Sums over the timed steps."""

    seconds: list[float]
    waited: float = 0.0
    places: float = 0.0
    done: Amount = Amount()


class StepBench:
    """Measures rows in this process, or as one rank of several. A trainer is kept while the layout stays."""

    def __init__(self, config: Config, plan: Plan, device: str, changes: list[str]):
        import_megatron()
        self.config, self.plan, self.changes = config, plan, changes
        is_cpu = device == "cpu"
        self.device = torch.device(device) if is_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if not is_cpu:
            torch.cuda.set_device(self.device)
        if plan.processes > 1:  # once for all trainers: processes cannot join again under torchrun
            dist.init_process_group(
                "gloo" if is_cpu else "nccl", timeout=timedelta(minutes=config.parallel.timeout_minutes)
            )
        clock = Clock(self.device, least=3, most=3) if is_cpu else Clock(self.device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]
        self.ceilings = measure_ceilings(clock, dtype)
        self._trainer: Trainer | None = None

    def answer(self, task: StepRow | None) -> Any:
        """The ceilings for None, else the task's row."""
        return self.ceilings if task is None else self.row(task)

    def row(self, task: StepRow) -> Row:
        """Figures of a layout and a choice of operators; what goes wrong becomes the row's status.

        A session that failed is not asked again: its memory, or its device, may be lost.
        """
        row: Row = {"layout": task.layout, "fused": task.fused, "status": "ok"}
        try:
            trainer = self._get_trainer(task.layout)
            if trainer.layout.any_rank(task.seconds <= 0):
                return row | {"status": TIME_UP}
            with self._operators(task.fused):
                row |= self._measure(trainer, task)
        except Exception as error:  # rows of other operators and layouts may still run
            if self.plan.processes > 1:  # the others wait for this rank
                raise
            row["status"] = _reason(error)
        return row

    def close(self) -> None:
        """Give the trainer's memory back and leave its process groups."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def leave(self) -> None:
        """The last call, where several processes have joined."""
        self.close()
        dist.destroy_process_group()

    def _operators(self, fused: str) -> AbstractContextManager[None]:
        """All ours, as kernels or as the run's references; or torch's own, but for one."""
        if fused == FUSED:
            return reference_only() if self.config.train.fused == "reference" else nullcontext()
        from benchmarks.torch_operators import fused_alone

        return fused_alone("" if fused == TORCH else fused)

    def _get_trainer(self, layout: RowFormat) -> Trainer:
        from metro_megatron.train.corpus import Corpus
        from metro_megatron.train.trainer import Trainer

        if self._trainer is None or self._trainer.config.data.row_format != layout:
            self.close()
            config = layout_config(self.config, layout)
            self._trainer = Trainer(config, Corpus.open(config), self.device)
        return self._trainer

    def _measure(self, trainer: Trainer, task: StepRow) -> Row:
        from metro_megatron.train.metrics import MetricSums

        plan, metrics = self.plan, MetricSums(trainer.layout, trainer.parts.all_terms)
        data = trainer.corpus.training_data(trainer.layout)
        profiled = PROFILED_STEPS if task.trace else 0
        totals, started = _Totals([]), time.perf_counter()
        found: Row = {}
        with closing(data.prefetch(0, plan.warm_up + plan.steps + profiled, 0)) as batches:
            for _ in range(plan.warm_up):
                trainer.step.train(next(batches), metrics)
            self._synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(plan.steps):
                self._timed_step(trainer, batches, metrics, totals)
                if trainer.layout.any_rank(time.perf_counter() - started > task.seconds):
                    break
            found |= self._figures(trainer, totals)
            if task.trace:
                steps = [next(batches) for _ in range(profiled)]
                found |= profile_steps(
                    lambda: [trainer.step.train(batch, metrics) for batch in steps], self.device, Path(task.trace)
                )
        return found

    def _timed_step(self, trainer: Trainer, batches: Iterator[StepBatch], metrics: Any, totals: _Totals) -> None:
        begin = time.perf_counter()
        batch = next(batches)
        totals.waited += time.perf_counter() - begin
        update = trainer.step.train(batch, metrics).read()
        self._synchronize()
        totals.seconds.append(time.perf_counter() - begin)
        if update.is_skipped:
            raise RuntimeError(f"step {batch.step} had gradients that are not finite (norm {update.grad_norm})")
        ranks = trainer.layout.data.size()
        totals.places += ranks * sum(one.tokens.numel() for one in batch.micro_batches)
        totals.done += Amount(batch.num_tokens, batch.num_squares)

    def _figures(self, trainer: Trainer, totals: _Totals) -> Row:
        config, steps = trainer.config, len(totals.seconds)
        seconds = statistics.median(totals.seconds)
        processes = trainer.layout.world.size()
        tflops = achieved_tflops(model_flops(config, totals.done), steps * seconds, processes)
        is_cuda = self.device.type == "cuda"
        return {
            "processes": processes,
            "steps": steps,
            "seconds_per_step": seconds,
            "slot_tokens_per_s": totals.places / steps / seconds,
            "tokens_per_s": totals.done.tokens / steps / seconds,
            "pad_percent": 100 * (1 - totals.done.tokens / totals.places),
            "gflop_per_token": model_flops(config, totals.done) / totals.done.tokens / 1e9,
            "tflops": tflops,
            "mfu_percent": 100 * tflops / self.ceilings.matrix_tflops,
            "peak_gb": torch.cuda.max_memory_allocated(self.device) / 1e9 if is_cuda else "",
            "data_percent": 100 * totals.waited / sum(totals.seconds),
            "micro_batches": self.plan.micro_batches,
            "micro_batch_tokens": config.data.micro_batch_tokens,
            "precision": config.train.precision,
            "recompute": config.parallel.recompute,
            "changes": " ".join(self.changes),
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory; try --parallel.recompute full, or fewer --data.micro_batch_tokens"
    return f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"


def layout_config(config: Config, layout: RowFormat) -> Config:
    """The same run in another row format; both have the same places in a micro batch."""
    return replace(config, data=replace(config.data, row_format=layout))


def add_gains(row: Row, rows: list[Row]) -> None:
    """Speed and memory compared with the row of the same layout where all operators are torch's own."""
    for base in rows:
        is_base = (base["layout"], base["fused"], base["status"]) == (row["layout"], TORCH, "ok")
        if is_base and row["status"] == "ok":
            row["speed_gain_percent"] = 100 * (base["seconds_per_step"] / row["seconds_per_step"] - 1)
            if base["peak_gb"] and row["peak_gb"]:
                row["memory_gain_percent"] = 100 * (1 - row["peak_gb"] / base["peak_gb"])
