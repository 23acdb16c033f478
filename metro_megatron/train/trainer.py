"""The run: build everything, then loop over steps, evaluations and checkpoints."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from fused.dispatch import describe
from metro_megatron.checkpoint.files import checkpoint_sha256
from metro_megatron.checkpoint.resume import is_branch_point
from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.data.fill import LEAST
from metro_megatron.data.loader import PretrainingData
from metro_megatron.errors import UserError
from metro_megatron.health.replicas import diverged
from metro_megatron.health.self_check import self_check
from metro_megatron.health.shards import WeightNorms, fingerprint
from metro_megatron.health.subject import Subject
from metro_megatron.health.watch import Watch
from metro_megatron.mcore import implementations
from metro_megatron.model.encoder import TIED
from metro_megatron.model.init import given_parts
from metro_megatron.objective.figures import weighted
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer, PendingUpdate, Update
from metro_megatron.plan.flops import Amount, achieved_tflops
from metro_megatron.plan.gpus import peak_tflops
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.train.build import Parts, initial_weights, refuse_mixed_libraries
from metro_megatron.train.clock import Clock
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.journal import note, note_spike
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.probes import Probes
from metro_megatron.train.report import Report
from metro_megatron.train.spikes import NormHistory
from metro_megatron.train.step import Step
from metro_megatron.train.stop import StopRequest
from metro_megatron.train.watchdog import Watchdog

MAX_SKIPPED = 50
"""Steps skipped in a row for gradients that are not finite, after which a run stops."""


class Diverged(UserError):
    """Ranks that should hold the same parameters do not."""


class Trainer:
    """One run on this rank. `corpus` has been opened, and with it everything a user can get wrong there."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device):
        self.config = config
        self.run = Path(config.train.output)
        self.corpus = corpus
        self.layout = Layout.create(config.parallel, device)
        refuse_mixed_libraries(config, self.layout)
        self.initial = initial_weights(config, corpus.tokenizer_folder)
        """None: all starts at random, or is loaded by `restore`."""
        self.parts = Parts.build(config, self.layout, corpus, self.initial.tensors if self.initial else None)
        self.pair = self.parts.pair
        self.homes = Homes.build(config, self.layout, self.pair.shared, self.pair.main, both_phases=TIED)
        self.optimizer = Optimizer(config, self.homes)
        if self.initial and config.train.precision != "fp32":
            for prefix, module in self.pair.modules():
                given = given_parts(module, prefix, self.layout.tensor, self.initial.tensors)
                self.optimizer.set_masters(given)
        self.step = Step(config, self.layout, self.parts, self.homes, self.optimizer)
        self.probes = Probes(config, self.layout, corpus)
        self.checkpoints = Checkpoints(config, self.layout, self.pair, self.optimizer)
        self.done = 0
        """Steps done."""
        self.seen_samples = 0
        """Global position of the next step's first sample."""
        self.seen_tokens = 0
        self.phase_begins: tuple[int, ...] = (0,)
        """Global positions at which the phases so far began."""
        self.branch: dict[str, Any] | None = None
        """Where the run branched from another, and the hash of that checkpoint."""
        self.unlogged = Amount()
        """What has been trained on since the last log line."""
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.norms = NormHistory(config.optimizer.skip_spikes)
        self.pending: deque[PendingUpdate] = deque()
        """Updates of the last steps whose figures have not been read."""
        self.watch = Watch(config) if self.layout.rank == 0 else None
        self.metrics = MetricSums(self.layout, self.parts.all_terms)
        """Of the steps since the last log line."""
        self.clock = Clock()
        self.stop: StopRequest | None = None
        self.watchdog: Watchdog | None = None
        self.failed_saves = 0
        """Saves in a row that failed."""
        self.remarks: list[str] = []
        """What there is to say about the checkpoint that the run goes on from."""
        self.told: dict[str, tuple[Any, Any]] = {}
        """Options that the run was told anew: as they were, and as they are."""
        self.report: Report | None = None

    def restore(self) -> None:
        """Continue from the newest whole checkpoint of the run folder, or from the one that the run branches from, if
        there is one. A collective call."""
        restored = self.checkpoints.restore()
        if restored is None:
            return
        folder, progress, self.remarks = restored.folder, restored.progress, restored.remarks
        self._refuse_other_data(folder.parent, progress)
        # Checkpoints of earlier releases have none.
        if "fingerprint" in progress and progress["fingerprint"] != self._fingerprint():
            raise UserError(
                f"{folder}: weights or moments are not those that were saved: what loads the checkpoint has lost or "
                "changed some; undo the change to the program"
            )
        self.told = restored.overridden
        self.done = progress["step"]
        self.seen_samples = progress["consumed_samples"]
        self.seen_tokens = progress["seen_tokens"]
        self.skipped_steps = progress["skipped_steps"]
        self.phase_begins = tuple(progress.get("phase_begins", [0]))
        self.norms.load_state(progress.get("norms", {}))
        if "unlogged" in progress:
            self.metrics.load_state(progress["unlogged"])
        self.branch = progress.get("branch")
        if is_branch_point(folder, self.config):
            self.branch = {"step": self.done, "checkpoint": checkpoint_sha256(folder)}

    def _refuse_other_data(self, run: Path, progress: dict[str, Any]) -> None:
        if progress["data"] != self.corpus.fingerprint:
            raise UserError(
                f"the shards of data.train are not those that {run} was trained on "
                "(their hashes differ): give the same shards, or choose another train.output"
            )
        if progress.get("filled_by", "") != self.corpus.filled_by:
            raise UserError(
                f"corruption.{self.config.corruption.source}: the model or cache is not the one that {run} was "
                "trained with (their hashes differ); give the same, or choose another train.output"
            )

    def train(self) -> None:
        """Train to the last step, or until SIGTERM or SIGHUP; either way the state is saved."""
        data = self.corpus.training_data(self.layout, self.phase_begins)
        report = self.report = self._open_report()
        if self.done == self.config.train.train_steps:
            self._finish(report)
            return
        if report:
            report.warn_of_padding(data, self.seen_samples)
        if self.config.train.self_check:
            self._check(report, data)
        norms = WeightNorms(self.pair, self.optimizer, self.layout)
        clock = self.clock = Clock()
        self.stop = StopRequest(self.layout.rank == 0, clock.seconds_to_stop)
        self.watchdog = self._new_watchdog()
        batches = data.prefetch(self.done, self.config.train.train_steps, self.seen_samples)
        try:
            for batch in clock.waiting(batches):
                self._sign(f"step {self.done + 1}", clock.longest_step)
                if any(self.done in window for window in self.config.skipped_steps):
                    self._read_updates(0)  # what is pending would be taken for updates of these steps
                    self.done += 1
                    self.seen_samples, self.phase_begins = batch.end, batch.phase_begins
                    clock.steps -= 1
                    continue
                if self.watch:
                    self.watch.batch(batch)
                limit = self.norms.limit(self.done)
                self.pending.append(self.step.train(batch, self.metrics, self.stop.is_asked, limit))
                self.done += 1
                if report:
                    report.first(self.done)
                self.unlogged += Amount(batch.num_tokens, batch.num_squares, batch.end - self.seen_samples)
                self.seen_samples = batch.end
                self.phase_begins = batch.phase_begins
                self.seen_tokens += batch.num_tokens
                is_last = self.done == self.config.train.train_steps
                is_logged = is_last or self.done % self.config.train.log_interval == 0
                # One step late, while a GPU works at this one. Figures that are logged are this step's.
                updates = self._read_updates(0 if is_logged else 1)
                if is_logged:
                    self._log(report, data, norms, updates[-1])
                # Every rank reads the same: whoever was told alone would save, or end, alone.
                self.stop.is_agreed = any(update.stops for update in updates)
                if self._is_due(self.config.train.eval_interval, is_last) and self.corpus.has_validation:
                    clock.pause(lambda: self._evaluate(report))
                if self._is_due(self.config.train.probe_interval, is_last) and not self.stop.is_agreed:
                    clock.pause(lambda: self._probe(report))
                is_end = is_last or self.stop.is_agreed
                if self._is_due(self.config.checkpoint.save_interval, is_end):
                    clock.save(lambda: self._try_to_save(report, is_end))  # noqa: B023 - called at once
                if self.stop.is_agreed:
                    break
        finally:
            if self.watchdog:
                self.watchdog.close()
            batches.close()
            self.stop.restore()
            if report:
                report.close()

    def _finish(self, report: Report | None) -> None:
        """Say that nothing is left to do, after what a stop behind the last step has left out."""
        evaluates = self.config.train.eval_interval > 0 and self.corpus.has_validation
        lacks = evaluates and report is not None and not report.has_validation(self.done)
        if self.layout.any_rank(lacks):
            self._evaluate(report)
            if self.config.train.probe_interval:
                self._probe(report)
        if report:
            report.say(f"{self.run} is finished: all its {self.done} steps are done")
            report.close()

    def evaluate(self) -> dict[str, float]:
        """Figures over the held-out samples, with masks and noise of their own; none if the run was asked to stop.

        A collective call.
        """
        self.homes.fetch_parameters()
        metrics = MetricSums(self.layout, self.parts.all_terms)
        for batch in self.corpus.evaluation_batches(self.layout):
            if self.stop:
                self.stop.is_agreed = self.stop.is_agreed or self.layout.any_rank(self.stop.is_asked)
                if self.stop.is_agreed:
                    return {}
            self._sign(f"batch {batch.step + 1} of an evaluation")
            self.step.evaluate(batch, metrics)
        return metrics.reduce()

    def save(self, report: Report | None = None) -> None:
        """Save the state after the steps done so far. A collective call."""
        self._sign("to save")
        self._read_updates(0)
        self.homes.fetch_parameters()
        self._refuse_diverged()
        progress: dict[str, Any] = {
            "step": self.done,
            "consumed_samples": self.seen_samples,
            "seen_tokens": self.seen_tokens,
            "skipped_steps": self.skipped_steps,
            "data": self.corpus.fingerprint,
            "fingerprint": self._fingerprint(),
            **({"filled_by": self.corpus.filled_by} if self.corpus.filled_by else {}),
            **({"phase_begins": self.phase_begins} if self.config.train.phases else {}),
            **({"branch": self.branch} if self.branch else {}),
            **({"norms": self.norms.state()} if self.norms.threshold else {}),
            **({"unlogged": self.metrics.state()} if self.unlogged.samples else {}),
        }
        folder, remarks = self.checkpoints.save(self.done, progress)
        if report:
            report.say(f"saved {folder}")
            report.say_all(remarks)

    def _refuse_diverged(self) -> None:
        names = diverged(self.pair, self.layout)
        if names:
            raise Diverged(
                f"after step {self.done}: ranks that should hold the same hold other values of {', '.join(names[:3])} "
                f"({len(names)} parameters in all), of which no checkpoint is made: a GPU may calculate wrongly; go on "
                "from the last checkpoint, on other machines if it comes again"
            )

    def _try_to_save(self, report: Report | None, must: bool) -> None:
        """Save; what was in its way is said, and ends the run if it must, or was there too often."""
        self._read_updates(0)  # what they say may end the run, and is no failed save
        try:
            self.save(report)
        except Diverged:
            raise
        except UserError as error:
            self.failed_saves += 1
            if must or self.failed_saves > self.config.checkpoint.failed_saves:
                raise
            if report:
                report.say_all(f"warning: not saved: {problem}" for problem in error.problems)
        else:
            self.failed_saves = 0

    def close(self) -> None:
        """Leave the process groups."""
        self.layout.destroy()

    def _new_watchdog(self) -> Watchdog | None:
        """None for a process that waits for no other."""
        world_size, seconds = self.layout.world.size(), 60.0 * self.config.parallel.timeout_minutes
        if world_size == 1:
            return None
        store = distributed_c10d._get_default_store()
        return Watchdog(store, self.layout.rank, world_size, seconds, self.run / "still")

    def _sign(self, doing: str, usual: float = 0.0) -> None:
        if self.watchdog:
            self.watchdog.sign(doing, usual)

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return interval > 0 and (is_last or self.done % interval == 0)

    def _fingerprint(self) -> str:
        """Of weights and moments. A collective call."""
        return fingerprint(self.pair, self.optimizer, self.layout)

    def _check(self, report: Report | None, data: PretrainingData) -> None:
        """Look at the parts of the run, with the next steps' batches. A collective call."""
        subject = Subject(
            config=self.config,
            layout=self.layout,
            pair=self.pair,
            corruptor=self.parts.corruptor,
            terms=self.parts.terms,
            homes=self.homes,
            optimizer=self.optimizer,
            step=self.step,
            new_sums=lambda: MetricSums(self.layout, self.parts.all_terms),
        )
        batch = data.step_batch(self.done, self.seen_samples)
        # Behind the last step a cache of replacements has nothing.
        has_next = self.done + 1 < self.config.train.train_steps
        line = self_check(subject, batch, data.step_batch(self.done + 1, batch.end) if has_next else None)
        if report:
            report.say(line)

    def _open_report(self) -> Report | None:
        if self.layout.rank != 0:
            return None
        self.run.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run / "run_config.yaml")
        copy_tokenizer(self.corpus.tokenizer_folder, self.run / "tokenizer")
        report = Report(self.run, self.parts.all_terms, self.done, self.config.train.train_steps)
        report.say(self._description())
        report.say(describe(self.layout.device))
        report.say(implementations(self.config, self.layout.device))
        report.say(self.corpus.description)
        if self.initial:
            report.say(self.initial.description)
        report.say_all(self.remarks)
        if self.told:
            note(self.run, self.done, self.told, report.say)
            report.say_all(f"from here on {name} is {now!r}, was {was!r}" for name, (was, now) in self.told.items())
        if self.done:
            begun = self.branch and self.branch["step"] == self.done
            whence = f"branching from {self.config.train.branch_from}" if begun else f"continuing {self.run}"
            report.say(f"{whence} after step {self.done}")
        return report

    def _description(self) -> str:
        layout, train = self.layout, self.config.train
        return (
            f"{layout.world.size()} processes on {layout.device.type} (tensor {layout.tensor.size()}, pipeline "
            f"{layout.pipeline.size()}, data {layout.data.size()}), {train.precision}"
        )

    def _read_updates(self, keep: int) -> list[Update]:
        """Read pending updates, all but the `keep` last ones, and count those that were skipped."""
        updates = []
        while len(self.pending) > keep:
            step = self.done + 1 - len(self.pending)
            updates.append(self.pending.popleft().read())
            if self.watch:
                self.watch.update(updates[-1])
            self.norms.add(step - 1, updates[-1].grad_norm)
            self._count_skipped(updates[-1], step)
        return updates

    def _count_skipped(self, update: Update, step: int) -> None:
        is_spike = update.is_skipped and math.isfinite(update.grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.is_skipped and not is_spike else 0
        self.skipped_steps += update.is_skipped
        if is_spike and self.report:
            note_spike(self.run, step, update.grad_norm, self.report.say)
            self.report.say(f"warning: step {step} skipped: gradient norm {update.grad_norm:.3g} is a spike")
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{MAX_SKIPPED} steps in a row had gradients that are not finite (the last one is step {step}): "
                "go on from the last checkpoint with a lower optimizer.lr or optimizer.clip_grad, or with "
                "train.precision bf16, named in train.override, or pass over such steps with train.skip_steps"
            )

    def _log(
        self,
        report: Report | None,
        data: PretrainingData,
        norms: WeightNorms,
        update: Update,
    ) -> None:
        figures, weights = self.metrics.reduce(), norms.measure()
        seconds, waited, steps = self.clock.lap()
        done, self.unlogged = self.unlogged, Amount()
        if not report or not self.watch:
            return
        figures.pop("tokens")  # with those before an interruption, which these seconds do not have
        terms = self.parts.all_terms
        figures["loss"] = weighted(terms, {term.name: figures[f"{term.name}_loss"] for term in terms}, self.done - 1)
        figures = {
            "consumed_samples": self.seen_samples,
            "consumed_tokens": self.seen_tokens,
            **figures,
            "grad_norm": update.grad_norm,
            "shared_grad_norm": update.shared_grad_norm,
            "stage_grad_norm": update.stage_grad_norm,
            "loss_scale": update.loss_scale,
            "skipped_steps": self.skipped_steps,
            "learning_rate": update.learning_rate,
            "tokens_per_second": done.tokens / seconds,
            **self._utilization(done, seconds),
            "seconds_per_step": seconds / steps,
            "data_share": waited / seconds,
        }
        planned = data.read_before(self.seen_samples - int(done.samples), self.seen_samples)
        report.training(self.done, figures, self.metrics.digest, self.watch.line(self.done, figures, weights, planned))
        if figures["non_pad_fraction"] < LEAST:
            report.warn_of_padding(data, self.seen_samples)

    def _utilization(self, done: Amount, seconds: float) -> dict[str, float]:
        """Model FLOPs of real tokens (plan/flops.py): in TFLOP/s a process, and as a share of its data sheet's."""
        train_steps = self.config.train.train_steps
        config = self.config.by_phase[self.config.phase_at(self.done - 1)]
        config = replace(config, early_exit=self.config.early_exit.held(self.done - 1, train_steps))
        tflops = achieved_tflops(config, done, seconds, self.layout.world.size())
        is_cuda = self.layout.device.type == "cuda"
        name = torch.cuda.get_device_name(self.layout.device) if is_cuda else ""
        peak = peak_tflops(name, self.config.train.precision)
        return {"tflops_per_gpu": tflops, **({"mfu": tflops / peak} if peak else {})}

    def _evaluate(self, report: Report | None) -> None:
        figures = self.evaluate()
        if report and figures:
            report.validation(self.done, figures)

    def _probe(self, report: Report | None) -> None:
        self._sign("to probe")
        self.homes.fetch_parameters()
        figures = self.probes.figures(self.step)
        if report:
            report.probes(self.done, figures)
