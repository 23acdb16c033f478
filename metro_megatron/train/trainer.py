"""The run: build everything, then loop over steps, evaluations and checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_megatron.checkpoint.files import checkpoint_sha256
from metro_megatron.checkpoint.read import SEGMENTS, find_segments
from metro_megatron.checkpoint.resume import beginning, is_branch_point
from metro_megatron.checkpoint.save import Checkpoints
from metro_megatron.config.file import save_config
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.fill import LEAST
from metro_megatron.data.loader import PretrainingData
from metro_megatron.errors import UserError
from metro_megatron.health.replicas import diverged
from metro_megatron.health.self_check import self_check
from metro_megatron.health.shards import WeightNorms, fingerprint
from metro_megatron.health.subject import Subject
from metro_megatron.health.watch import Watch
from metro_megatron.model.encoder import TIED
from metro_megatron.model.init import starting_parts
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer, Update
from metro_megatron.tokenizer.tokenizer import copy_tokenizer
from metro_megatron.train.build import Parts, initial_weights, refuse_mixed_libraries
from metro_megatron.train.clock import Clock
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.interval import interval_figures
from metro_megatron.train.journal import note, note_beginning, note_rollback, note_spike, rolled_back
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.opening import opening_lines
from metro_megatron.train.past_updates import BadStep, PastUpdates
from metro_megatron.train.probes import Probes
from metro_megatron.train.progress import Progress
from metro_megatron.train.report import Report
from metro_megatron.train.saves import Diverged, Saves, Say
from metro_megatron.train.step import Step
from metro_megatron.train.stop import StopRequest
from metro_megatron.train.watchdog import Watchdog

MAX_ROLLBACKS = 3
"""Times that a run goes back to one checkpoint."""


class Trainer:
    """One run on this rank. `corpus` has been opened, and with it everything a user can get wrong there."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, watchdog: Watchdog | None = None):
        self.config = config
        self.watchdog = watchdog
        self.run = Path(config.train.output)
        self.corpus = corpus
        self.layout = Layout.create(config.parallel, device, watchdog.store if watchdog else None)
        self._sign("to build the models")
        refuse_mixed_libraries(config, self.layout)
        self.initial = initial_weights(config, corpus.tokenizer_folder)
        """None: all starts at random, or is loaded by `restore`."""
        self.parts = Parts.build(config, self.layout, corpus, self.initial.tensors if self.initial else None)
        self.pair = self.parts.pair
        self.homes = Homes.build(config, self.layout, self.pair.shared, self.pair.main, both_phases=TIED)
        self.optimizer = Optimizer(config, self.homes)
        if config.train.precision != "fp32" and beginning(config) is None:  # else a checkpoint has them
            self.optimizer.set_masters(self._starting_values())
        self.step = Step(config, self.layout, self.parts, self.homes, self.optimizer)
        self.probes = Probes(config, self.layout, corpus)
        self.checkpoints = Checkpoints(config, self.layout, self.pair, self.optimizer)
        self.saves = Saves(self.checkpoints, config.checkpoint)
        self.rolled_back: list[range] = []
        """Steps, counted from 0, that the run went back from and passes over."""
        self._begin()
        self.clock = Clock()
        self.stop: StopRequest | None = None
        self.remarks: list[str] = []
        """What there is to say about the checkpoint that the run goes on from."""
        self.told: dict[str, tuple[Any, Any]] = {}
        """Options that the run was told anew: as they were, and as they are."""
        self.report: Report | None = None

    def _starting_values(self) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """What weights in 16 bits were rounded from."""
        given = self.initial.tensors if self.initial else None
        for prefix, module in self.pair.modules():
            yield from starting_parts(
                module, prefix, self.config.model, self.config.train.seed, self.layout.tensor, given
            )

    def _begin(self) -> None:
        """Nothing is done so far."""
        self.progress = Progress()
        self.past = PastUpdates(self.config, self._hear)
        self.watch = Watch(self.config) if self.layout.rank == 0 else None
        self.metrics = MetricSums(self.layout, self.parts.all_terms)
        """Of the steps since the last log line."""

    def restore(self) -> bool:
        """Continue from the newest whole checkpoint of the run folder, or from the one that the run branches from.

        Returns whether there is one. A collective call.
        """
        self._sign("to look for a checkpoint", self.checkpoints.seconds_to_load)
        restored = self.checkpoints.restore()
        if restored is None:
            return False
        folder, progress, self.remarks = restored.folder, restored.progress, restored.remarks
        self._refuse_other_data(folder.parent, progress)
        # Checkpoints of earlier releases have none.
        if "fingerprint" in progress and progress["fingerprint"] != self._fingerprint():
            raise UserError(
                f"{folder}: weights or moments are not those that were saved: what loads the checkpoint has lost or "
                "changed some; undo the change to the program"
            )
        self.told = restored.overridden
        self.progress = Progress.from_state(progress)
        before = self._samples_before()
        if progress.get("samples_before", before) != before:  # checkpoints of earlier releases have none
            raise UserError(
                f"{folder}: the run would go on in another order of samples: those before its place are not those that "
                "it was trained on; undo the change to the program, or bring back shards that tools/inspect_data.py "
                "--verify finds damaged"
            )
        self.past.load_state(progress)
        if "unlogged" in progress:
            self.metrics.load_state(progress["unlogged"])
        if is_branch_point(folder, self.config):
            self.progress.branch = {
                "step": self.progress.done,
                "consumed_samples": self.progress.seen_samples,
                "checkpoint": checkpoint_sha256(folder),
            }
        noted = self.layout.of_first_rank(lambda: rolled_back(self.run))
        self.rolled_back += [window for window in noted if window not in self.rolled_back]
        return True

    def _refuse_other_data(self, run: Path, progress: dict[str, Any]) -> None:
        changes = self.corpus.changed_shards(progress["data"], progress.get("data_index"))  # earlier releases': none
        if changes:
            more = f" and {len(changes) - 5:,} more" if len(changes) > 5 else ""
            raise UserError(
                f"the shards of data.train are not those that {run} was trained on ({', '.join(changes[:5])}{more}): "
                "give the same shards, or choose another train.output"
            )
        if progress.get("filled_by", "") != self.corpus.filled_by:
            raise UserError(
                f"corruption.{self.config.corruption.source}: the model or cache is not the one that {run} was "
                "trained with (their hashes differ); give the same, or choose another train.output"
            )

    def train(self) -> None:
        """Train to the last step, or until SIGTERM or SIGHUP; either way the state is saved."""
        try:
            while bad := self._train_on():
                if self._is_told_to_end(bad):
                    return
                self._roll_back(bad)
        finally:
            if self.stop:
                self.stop.restore()
                self.stop = None

    def _train_on(self) -> BadStep | None:
        """Returns the step that the run shall go back from; None: it has come to its end, or was told to."""
        data = self.corpus.training_data(self.layout, self.progress.phase_begins)
        self.checkpoints.on_first_rank(self._open_report)
        report = self.report
        is_finished = self.progress.done == self.config.train.train_steps
        self._make_up(report, is_finished)
        if is_finished:
            if report:
                report.say(f"{self.run} is finished: all its {self.progress.done} steps are done")
                report.close()
            return None
        if report:
            report.warn_of_padding(data, self.progress.seen_samples)
        if self.config.train.self_check:
            self._check(report, data)
        norms = WeightNorms(self.pair, self.optimizer, self.layout)
        clock = self.clock = Clock()
        self._sign("to train")
        # Kept where the run goes back: what it was told meanwhile counts.
        self.stop = self.stop or StopRequest(self.layout.rank == 0, self._seconds_to_stop)
        batches = data.prefetch(self.progress.done, self.config.train.train_steps, self.progress.seen_samples)
        try:
            for batch in clock.waiting(batches):
                if self.passes_over(batch.step):
                    self.past.read()  # what is pending would be taken for updates of these steps
                    self.progress.passed_over(batch)
                    clock.steps -= 1
                    continue
                self._launch(batch)
                is_last = self.progress.done == self.config.train.train_steps
                is_logged = is_last or self.progress.done % self.config.train.log_interval == 0
                # One step late, while a GPU works at this one. Figures that are logged are this step's.
                updates = self.past.read(0 if is_logged else 1)
                if is_logged:
                    self._log(report, data, norms, updates[-1])
                # Every rank reads the same: whoever was told alone would save, or end, alone.
                self.stop.is_agreed = any(update.stops for update in updates)
                self._look_up(report, is_last)
                if self.stop.is_agreed:
                    break
        except BadStep as bad:
            # All ranks are here, however long some of them write.
            self._sign("to save", self.saves.longest)
            self.saves.end_save_before(_saying(report), goes_on=False)
            return bad
        finally:
            self._sign("to end", self.saves.longest)
            batches.close()
            self.checkpoints.close()
            if report:
                self.saves.tell(report.say_all)
                report.close()
        return None

    def passes_over(self, step: int) -> bool:
        """Whether the samples of a step, counted from 0, are left out."""
        return any(step in window for window in (*self.config.skipped_steps, *self.rolled_back))

    def _launch(self, batch: StepBatch) -> None:
        assert self.stop
        step = self.progress.done + 1
        self._sign(f"step {step}", self.clock.longest_step)
        if self.watch:
            self.watch.batch(batch)
        limit = self.past.norms.limit(batch.step)
        self.past.add(step, self.step.train(batch, self.metrics, self.stop.is_asked, limit))
        self.progress.trained(batch, self.config)
        if self.report:
            self.report.first(step)
            self.saves.tell(self.report.say_all)

    def _look_up(self, report: Report | None, is_last: bool) -> None:
        """Evaluate, probe and save what is due after a step."""
        assert self.stop
        if self._is_due(self.config.train.eval_interval, is_last) and self.corpus.has_validation:
            self.clock.pause(lambda: self._evaluate(report))
        if self._is_due(self.config.train.probe_interval, is_last) and not self.stop.is_agreed:
            self.clock.pause(lambda: self._probe(report))
        is_end = is_last or self.stop.is_agreed
        if self._is_due(self.config.checkpoint.save_interval, is_end):
            self.clock.pause(lambda: self._keep(report, is_end))

    def _is_told_to_end(self, bad: BadStep) -> bool:
        """Whether going back is the next start's. Nothing has to be saved: it comes to the same bad step again. A
        collective call."""
        assert self.stop
        is_told = self.layout.any_rank(self.stop.is_asked)
        if is_told and self.report:
            self.report.say(f"step {bad.step}: {bad.cause}; the same command goes back from it")
        return is_told

    def _roll_back(self, bad: BadStep) -> None:
        """Go back to the newest checkpoint, and pass over the samples from there to the bad step. A collective call.

        Nothing of it has to be saved: a run that is killed comes to the same bad step again, or to its line in the
        journal. Raises UserError if there is no checkpoint, or none that helps.
        """
        say = self.report.say if self.report else lambda line: None
        self.homes.fetch_parameters()  # nothing is on its way into what is loaded
        self._begin()
        problem = f"step {bad.step}: {bad.cause}, and train.bad_steps is rollback"
        if not self.restore():
            raise UserError(f"{problem}, but there is no checkpoint yet: give other options, or train.bad_steps skip")
        window = range(self.progress.done, bad.step)
        if sum(one.start == window.start for one in self.rolled_back) >= MAX_ROLLBACKS:
            raise UserError(
                f"{problem}, but the run went back to step {window.start} {MAX_ROLLBACKS} times: give other options, "
                "named in train.override, or an older checkpoint"
            )
        say(
            f"warning: step {bad.step}: {bad.cause}; going back, and past the samples of steps "
            f"{window.start + 1} to {window.stop}"
        )
        self.rolled_back.append(window)
        if self.layout.rank == 0:
            note_rollback(self.run, window, bad.cause, say)

    def _make_up(self, report: Report | None, is_last: bool) -> None:
        """Do what was due after the last step done and was left out as the run was told to stop. A collective call."""
        is_own = self.progress.done > 0 and (self.progress.branch or {}).get("step") != self.progress.done
        is_due = self._is_due(self.config.train.eval_interval, is_last) and self.corpus.has_validation
        lacks = is_own and is_due and report is not None and not report.has_validation(self.progress.done)
        if self.layout.any_rank(lacks):
            self._evaluate(report)
            if self._is_due(self.config.train.probe_interval, is_last):
                self._probe(report)

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
        """Save the state after the steps done so far, and wait for it. A collective call."""
        self.saves.now(self.progress.done, self._state, _saying(report))

    def _keep(self, report: Report | None, is_end: bool) -> None:
        """Save, or begin to."""
        self._sign("to save", self.saves.longest)
        self.past.read()  # what they say may end the run, and is no failed save
        self.saves.keep(self.progress.done, self._state, _saying(report), is_end)

    def _seconds_to_stop(self) -> float:
        """The most that two steps, after which all ranks know that they shall stop, and two saves, of which one has
        begun, will take, the first one on a slow disk; 0: no step's time is known."""
        if not self.clock.longest_step:
            return 0.0
        return 2 * (self.clock.longest_step + (self.saves.longest or self.checkpoints.seconds_to_load))

    def _state(self) -> dict[str, Any]:
        """progress.json of a checkpoint at this step, whose parameters are fetched. A collective call."""
        self._sign("to save", self.saves.longest)
        self.past.read()
        self.homes.fetch_parameters()
        self._refuse_diverged()
        return {
            **self.progress.state(),
            **self.past.state(),
            "data": self.corpus.fingerprint,
            "data_index": self.corpus.index_fingerprint,
            "fingerprint": self._fingerprint(),
            "samples_before": self._samples_before(),
            **({"filled_by": self.corpus.filled_by} if self.corpus.filled_by else {}),
            **({"unlogged": self.metrics.state()} if self.progress.unlogged.samples else {}),
        }

    def _refuse_diverged(self) -> None:
        names = diverged(self.pair, self.layout)
        if names:
            raise Diverged(
                f"after step {self.progress.done}: ranks that should hold the same hold other values of "
                f"{', '.join(names[:3])} ({len(names)} parameters in all), of which no checkpoint is made: a GPU may "
                "calculate wrongly; go on from the last checkpoint, on other machines if it comes again"
            )

    def close(self) -> None:
        """Leave the process groups."""
        self.layout.destroy()

    def _sign(self, doing: str, usual: float = 0.0) -> None:
        if self.watchdog:
            self.watchdog.sign(doing, usual)

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return interval > 0 and (is_last or self.progress.done % interval == 0)

    def _fingerprint(self) -> str:
        """Of weights and moments. A collective call."""
        return fingerprint(self.pair, self.optimizer, self.layout)

    def _samples_before(self) -> str:
        """A hash of the last ones before the run's place."""
        return self.corpus.samples_before(self.progress.seen_samples, self.progress.phase_begins)

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
        batch = data.step_batch(self.progress.done, self.progress.seen_samples)
        # Behind the last step a cache of replacements has nothing.
        has_next = self.progress.done + 1 < self.config.train.train_steps
        following = data.step_batch(self.progress.done + 1, batch.end) if has_next else None
        line = self_check(subject, batch, following)
        if report:
            report.say(line)

    def _open_report(self) -> None:
        """What a run says first, on the first rank."""
        self.run.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run / "run_config.yaml")
        copy_tokenizer(self.corpus.tokenizer_folder, self.run / "tokenizer")
        if self.initial:
            self.initial.write_segments(self.run)
        begins = self.progress.branch and self.progress.branch["step"] == self.progress.done
        if begins and (segments := find_segments(Path(self.config.train.branch_from))):
            shutil.copyfile(segments, self.run / SEGMENTS)
        before = self.report
        report = Report(self.run, self.parts.all_terms, self.progress.done, self.config.train.train_steps)
        report.has_begun = before is not None and before.has_begun
        report.say_all(opening_lines(self.config, self.layout, self.corpus, self.initial))
        report.say_all(self.remarks)
        if not self.progress.done:
            note_beginning(self.run, report.say)
        if self.told:
            note(self.run, self.progress.done, self.told, report.say)
            report.say_all(f"from here on {name} is {now!r}, was {was!r}" for name, (was, now) in self.told.items())
        if self.progress.done:
            whence = f"branching from {self.config.train.branch_from}" if begins else f"continuing {self.run}"
            report.say(f"{whence} after step {self.progress.done}")
        self.report = report

    def _hear(self, step: int, update: Update) -> None:
        if self.watch:
            self.watch.update(update)
        if self.report and update.is_skipped and math.isfinite(update.grad_norm):
            note_spike(self.run, step, update.grad_norm, self.report.say)
            self.report.say(f"warning: step {step} skipped: gradient norm {update.grad_norm:.3g} is a spike")

    def _log(self, report: Report | None, data: PretrainingData, norms: WeightNorms, update: Update) -> None:
        sums, weights, lap = self.metrics.reduce(), norms.measure(), self.clock.lap()
        step, seen, trained = self.progress.done, self.progress.seen_samples, self.progress.logged()
        if not report or not self.watch:
            return
        terms, skipped = self.parts.all_terms, self.past.skipped
        figures = interval_figures(self.config, self.layout, terms, self.progress, sums, lap, trained, update, skipped)
        planned = data.read_before(seen - int(trained[0].samples), seen)
        report.training(step, figures, self.metrics.digest, self.watch.line(step, figures, weights, planned))
        if figures["non_pad_fraction"] < LEAST:
            report.warn_of_padding(data, seen)

    def _evaluate(self, report: Report | None) -> None:
        figures = self.evaluate()
        if report and figures:
            report.validation(self.progress.done, figures)

    def _probe(self, report: Report | None) -> None:
        self._sign("to probe")
        self.homes.fetch_parameters()
        figures = self.probes.figures(self.step)
        if report:
            report.probes(self.progress.done, figures)


def _saying(report: Report | None) -> Say:
    return report.say_all if report else lambda lines: None
