"""A step of a run once more, alone on one machine, with all that it read and the loss of every token.

Order, masks, replacements and dropout are functions of global coordinates, so that one process does what a cluster's
ranks did together. It begins from the newest whole checkpoint before the step, and goes on to the end of the step's
line in metrics.jsonl, whose digest and figures say whether it was the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from metro_megatron.checkpoint.files import check_metadata, iteration_folder, saved_steps, verify_integrity
from metro_megatron.checkpoint.positions import branch_step
from metro_megatron.checkpoint.resume import overridden_options
from metro_megatron.cli.options import flatten, with_values
from metro_megatron.config.file import load_config
from metro_megatron.config.schema import Config, ParallelConfig
from metro_megatron.corruption.corruptor import Proposal
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.errors import UserError
from metro_megatron.evaluate.token_losses import SampleLosses
from metro_megatron.files import json_lines
from metro_megatron.model.encoder import Reading
from metro_megatron.objective.term import Sums
from metro_megatron.objective.vocabulary import at_masks
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.journal import PassedOver, rolled_back, told_between, values_before
from metro_megatron.train.launch import with_replacements
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl, and what its steps gave here."""

    step: int
    """Of its last step."""
    is_same: bool | None
    """Whether documents, masks and replacements were the same; None: the line is of a release without digests."""
    differences: dict[str, float]
    """Relative, by loss."""


@dataclass(frozen=True)
class Replayed:
    """A step and how it compares."""

    step: int
    begin: Path | None
    """The checkpoint from which it was reached; None: from the run's beginning."""
    remarks: list[str]
    """Why it is not the newest one before the step, if it is not."""
    samples: list[SampleLosses]
    """By global position."""
    weights: dict[str, float]
    """Of the losses in the whole one, at this step."""
    lines: list[Line]
    """Of the run, as far as their steps were done again."""


def replay(run: Path, step: int, device: torch.device, on_step: Callable[[int, int], object]) -> Replayed:
    """Do a step of a run again, counted from 1; on_step hears of each step done, and of the last one.

    The run's data must be where its run_config.yaml says. Nothing is written into the run folder. Raises UserError for
    a step that the run has not, and where no checkpoint before it is whole.
    """
    begin, remarks = _beginning(run, step)
    config = _planned(run, step)
    _refuse_changes(run, begin, step)
    logged = _logged(run)
    # Of one configuration, as the step.
    last = min((one for one in logged if one >= step and not values_before(run, step, one)), default=step)
    with tempfile.TemporaryDirectory() as scratch:
        alone = replace(
            config,
            parallel=ParallelConfig(
                recompute=config.parallel.recompute,
                recompute_modules=config.parallel.recompute_modules,
                grad_reduce_in_fp32=config.parallel.grad_reduce_in_fp32,
            ),
            train=replace(
                config.train,
                output=scratch,
                branch_from=str(begin) if begin else config.train.branch_from,
                override=overridden_options(begin, config) if begin else [],
                self_check=False,
            ),
        )
        trainer = Trainer(alone, with_replacements(Corpus.open(alone)), device)
        try:
            trainer.restore()
            trainer.rolled_back = rolled_back(run)
            recorder = _Recorder(trainer, step)
            lines = list(_steps(trainer, last, logged, recorder, on_step))
            weights = {term.name: term.weight_at(step - 1) for term in trainer.parts.all_terms}
        finally:
            trainer.close()
    samples = sorted(recorder.samples, key=lambda sample: sample.place)
    return Replayed(step, begin, remarks, samples, weights, lines)


def _beginning(run: Path, step: int) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint before the step, and why later ones are not taken."""
    remarks: list[str] = []
    for saved in (one for one in reversed(saved_steps(run)) if one < step):
        folder = iteration_folder(run, saved)
        try:
            verify_integrity(folder)
            check_metadata(folder)
        except UserError as error:
            remarks += error.problems
            continue
        return folder, remarks
    if remarks:
        raise UserError([*remarks, f"{run}: no checkpoint before step {step} is whole"])
    return None, remarks


def _planned(run: Path, step: int) -> Config:
    """The run's configuration at the step: that of the next checkpoint, without what it was told in between."""
    later = {iteration_folder(run, saved): float(saved) for saved in saved_steps(run) if saved >= step}
    plans = {folder / "run_config.yaml": saved for folder, saved in {**later, run: math.inf}.items()}
    plan = next((path for path in plans if path.is_file()), None)
    if plan is None:
        raise UserError(f"{run}: is no run folder (no run_config.yaml); give the folder of train.output")
    config = load_config(plan)
    if told_since := values_before(run, step, plans[plan]):
        config = with_values(Config, flatten(config) | told_since)
    if not 1 <= step <= config.train.train_steps:
        raise UserError(f"--step {step}: must be 1 to train.train_steps {config.train.train_steps}")
    if step <= branch_step(config):
        point = Path(config.train.branch_from)
        raise UserError(f"--step {step}: was done before {run} branched from {point}; give --run {point.parent}")
    if why := PassedOver(run, config).why(step):
        raise UserError(f"--step {step}: was passed over: {why}")
    return config


def _refuse_changes(run: Path, begin: Path | None, step: int) -> None:
    """One configuration serves the whole stretch: raise UserError where the run was told something else on the way."""
    done = int(begin.name.removeprefix("iter_")) if begin else 0
    changed = told_between(run, done, step)
    if changed:
        raise UserError(
            f"{run}: was told {', '.join(changed)} anew between step {done}, from which it would be done again, and "
            f"step {step}; the checkpoints in between are gone or damaged (checkpoint.keep_last)"
        )


def _logged(run: Path) -> dict[int, dict[str, Any]]:
    """The lines of training by their step."""
    return {line["step"]: line for line in json_lines(run / "metrics.jsonl", "step", "consumed_samples")}


def _steps(
    trainer: Trainer,
    last: int,
    logged: dict[int, dict[str, Any]],
    recorder: _Recorder,
    on_step: Callable[[int, int], object],
) -> Iterator[Line]:
    """Train on to step `last`; yields what the lines passed on the way say."""
    data = trainer.corpus.training_data(trainer.layout, trainer.progress.phase_begins)
    # What the checkpoint does not say of the line under way has been lost: an earlier release's.
    is_whole = trainer.progress.done == 0 or trainer.progress.done in logged or trainer.metrics.before is not None
    for done in range(trainer.progress.done, last):
        batch = data.step_batch(done, trainer.progress.seen_samples)
        trainer.progress.passed_over(batch)
        if not trainer.passes_over(done):
            with recorder.listening(done + 1):
                update = trainer.step.train(batch, trainer.metrics, limit=trainer.past.norms.limit(done)).read()
                trainer.past.norms.add(done, update.grad_norm)
        if done + 1 in logged:
            figures = trainer.metrics.reduce()
            if is_whole:
                yield _compared(logged[done + 1], figures, trainer.metrics)
            is_whole = True
        on_step(done + 1, last)


def _compared(line: dict[str, Any], figures: dict[str, float], metrics: MetricSums) -> Line:
    is_same = line["digest"] == f"{metrics.digest:016x}" if "digest" in line else None
    names = [f"{term.name}_loss" for term in metrics.terms]
    both = {name: (line.get(name), figures[name]) for name in names}
    differences = {
        name: abs(here - there) / abs(there) for name, (there, here) in both.items() if there and math.isfinite(here)
    }
    return Line(line["step"], is_same, differences)


class _Recorder:
    """Listens to one step of a trainer that has no pipeline: what main reads, and the losses of every token."""

    def __init__(self, trainer: Trainer, step: int):
        self.trainer = trainer
        self.step = step
        self.samples: list[SampleLosses] = []

    @contextmanager
    def listening(self, step: int) -> Iterator[None]:
        """Listen while a step is trained, if it is the one."""
        if step != self.step:
            yield
            return
        one, own = self.trainer.step, self.trainer.parts.corruptor.terms
        propose, losses = one.propose, one.losses
        proposed: list[dict[str, Tensor]] = []
        said: dict[int, tuple[View, dict[str, Tensor]]] = {}

        def hear_proposals(micro_batches: list[MicroBatch], batch: StepBatch, metrics: MetricSums) -> list[Proposal]:
            proposals = propose(micro_batches, batch, metrics)
            for micro_batch, proposal in zip(micro_batches, proposals, strict=True):
                found = proposal.losses
                proposed.append({} if found is None else {own[0].name: at_masks(found, micro_batch)})
            return proposals

        def hear_losses(names: list[str], reading: Reading, view: View, batch: StepBatch, sums: Sums) -> Tensor:
            with torch.no_grad():
                found = {name: one.terms[name].token_losses(reading, view, self.trainer.layout) for name in names}
            _, of_view = said.setdefault(id(view), (view, {}))
            of_view |= {name: value for name, value in found.items() if value is not None}
            return losses(names, reading, view, batch, sums)

        one.propose, one.losses = hear_proposals, hear_losses  # type: ignore[method-assign]
        try:
            yield
        finally:
            del one.propose, one.losses
        for (view, of_main), of_corruptor in zip(said.values(), proposed, strict=True):
            self.samples += _samples(view, of_corruptor | of_main)


def _samples(view: View, losses: dict[str, Tensor]) -> Iterator[SampleLosses]:
    """The samples of a micro batch, row by row, left to right; losses are [B, S]."""
    micro_batch = view.micro_batch
    assert micro_batch.sample_places is not None
    lengths, places = micro_batch.sample_lengths.tolist(), micro_batch.sample_places.tolist()
    begin = 0
    # Samples of a second view, which come after the first one's, have no place.
    for number, (length, place) in enumerate(zip(lengths, places, strict=False)):
        row, first = (0, begin) if micro_batch.is_packed else (number, 0)
        begin += length
        if length:

            def cut(values: Tensor, row: int = row, first: int = first, length: int = length) -> NDArray[Any]:
                return values[row, first : first + length].cpu().numpy()

            yield SampleLosses(
                place,
                cut(micro_batch.tokens),
                cut(view.tokens),
                cut(micro_batch.is_masked),
                {name: cut(values.double()) for name, values in losses.items()},
            )
