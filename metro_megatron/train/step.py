"""One optimizer step in two phases (docs/walk.md, rows 7 to 10).

Phase 1: each pipeline rank has its share of the micro batches corrupted; the auxiliary model, where there is one, runs
whole, forward and backward, and samples replacements. The samples are exchanged. Phase 2: the main model runs
megatron-core's pipeline schedule on the corrupted micro batches. No gradient crosses the sampling, so nothing else
links the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.corruption.corruptor import Proposal
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View, corrupt, side_by_side
from metro_megatron.model.encoder import Reading
from metro_megatron.objective.figures import counts, weighted
from metro_megatron.objective.term import Sums
from metro_megatron.objective.terms import num_distractors
from metro_megatron.parallel.exchange import exchange, share
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer, PendingUpdate
from metro_megatron.randomness import Purpose, hash64
from metro_megatron.train.build import Parts
from metro_megatron.train.metrics import MetricSums


class Step:
    """The two phases over the parts of a run; the same code trains and evaluates."""

    def __init__(self, config: Config, layout: Layout, parts: Parts, homes: Homes, optimizer: Optimizer):
        self.config = config
        self.layout = layout
        self.parts = parts
        self.terms = {term.name: term for term in parts.terms}
        assert any(term.layer is None for term in parts.terms), "the schedule begins backward behind the last stage"
        self.asks_layers = any(term.layer is not None for term in parts.terms)
        """Whether a head sits on a middle layer."""
        self.homes = homes
        self.optimizer = optimizer
        self.schedule = get_forward_backward_func()

    def train(
        self, batch: StepBatch, metrics: MetricSums, stops: bool = False, limit: float = math.inf
    ) -> PendingUpdate:
        """Launch both phases, the reduction and the update; nothing in here waits for a GPU.

        stops: whether this rank has been asked to stop; limit: of the gradient norm. See Optimizer.step.
        """
        self.gradients(batch, metrics)
        metrics.end_step()
        return self.optimizer.step(batch.step, stops, limit)

    def gradients(self, batch: StepBatch, metrics: MetricSums) -> list[View]:
        """Both phases and the reduction: what the update reads. Returns what main read."""
        micro_batches = self.on_device(batch)
        # Gathers of updated parameters start here; those of the shared home are awaited, it computes first.
        self.homes.begin_step()
        with self.homes.corrupting():
            proposals = self.propose(micro_batches, batch, metrics)
        # From here on phase 1's gradients travel while main computes.
        self.homes.end_corruption_phase()
        exits = self.config.early_exit.exits_at(batch.step, self.config.train.train_steps)
        views = [replace(view, exits=exits) for view in self.exchange(micro_batches, proposals)]
        with self.homes.quiet():  # the tied parameters collect gradients in both phases
            self.read(views, batch, metrics)
        self.homes.end_main_phase()
        return views

    def on_device(self, batch: StepBatch) -> list[MicroBatch]:
        """The micro batches of a step of training, with the key of its dropout; modules are told that they train."""
        self._set_training(True)
        # The operators take seeds as signed numbers and add up to 3 per layer: two bits less leave room for both.
        seed = int(hash64(self.config.train.seed, Purpose.DROPOUT, batch.step)) >> 2
        dropout_seed = torch.full((1,), seed, device=self.layout.device)
        return [
            replace(micro_batch.to(self.layout.device), dropout_seed=dropout_seed)
            for micro_batch in batch.micro_batches
        ]

    @torch.no_grad()
    def evaluate(self, batch: StepBatch, metrics: MetricSums) -> list[Tensor]:
        """Both phases forward only, without dropout; returns the corrupted ids [B, S] of each micro batch.

        The caller has fetched the parameters.
        """
        self._set_training(False)
        micro_batches = [micro_batch.to(self.layout.device) for micro_batch in batch.micro_batches]
        views = self.exchange(micro_batches, self.propose(micro_batches, batch, metrics))
        self.read(views, batch, metrics)
        metrics.end_step()
        return [view.tokens for view in views]

    @torch.no_grad()
    def read_originals(self, micro_batches: list[MicroBatch], use: Callable[[int, Tensor], object]) -> None:
        """Main reads original tokens: forward only, without dropout and without heads.

        On the last stage `use` gets the number of each micro batch and its hidden states [S, B, H], which are whole on
        every tensor-parallel rank. All ranks of a pipeline call with as many micro batches of one shape. The caller has
        fetched the parameters.
        """
        self._set_training(False)
        moved = [micro_batch.to(self.layout.device) for micro_batch in micro_batches]

        def forward_step(data: Iterator[tuple[int, MicroBatch]], model: DistributedDataParallel):
            number, micro_batch = next(data)
            # Around the wrapper, whose forward runs heads: its parameters are there already.
            hidden = model.module.encode(micro_batch.tokens, micro_batch)
            if not model.module.post_process:
                return hidden, None
            use(number, hidden)
            return hidden.new_zeros(()), lambda nothing: (nothing, {})

        self._run_schedule(forward_step, list(enumerate(moved)), moved[0].tokens.shape)

    def _set_training(self, is_training: bool) -> None:
        for _, module in self.parts.pair.modules():
            module.train(is_training)

    def propose(self, micro_batches: list[MicroBatch], batch: StepBatch, metrics: MetricSums) -> list[Proposal]:
        """What is proposed for this pipeline rank's share of the micro batches."""
        proposals = []
        for module in self.parts.corruptor.trained.values():
            module.set_is_first_microbatch()  # FP8 copies of weights are made anew, as the schedule has it for main
        for j in share(len(micro_batches), self.layout.pipeline):
            proposal = self.parts.corruptor.propose(micro_batches[j], batch, self.optimizer.scale_loss)
            metrics.add([proposal.sums])
            proposals.append(proposal)
        return proposals

    def exchange(self, micro_batches: list[MicroBatch], proposals: list[Proposal]) -> list[View]:
        """What main reads: all proposals of the pipeline group in their micro batches."""
        masked = [micro_batch.masked_index.numel() for micro_batch in micro_batches]
        sampled = exchange([proposal.sampled for proposal in proposals], masked, self.layout.pipeline)
        views = [corrupt(*one) for one in zip(micro_batches, sampled, strict=True)]
        count = num_distractors(self.parts.terms)
        if count:
            own = [proposal.distractors.flatten() for proposal in proposals if proposal.distractors is not None]
            everyone = exchange(own, [count * number for number in masked], self.layout.pipeline)
            views = [replace(view, distractors=ids.view(-1, count)) for view, ids in zip(views, everyone, strict=True)]
        return views

    def read(self, views: list[View], batch: StepBatch, metrics: MetricSums) -> None:
        """The pipeline schedule over all micro batches of this data-parallel rank."""
        views = [self._with_second(view) for view in views]

        def forward_step(data: Iterator[View], model: torch.nn.Module):
            view = next(data)
            sums: Sums = {}

            def judge(name: str, reading: Reading) -> Tensor:
                # A layer that is recomputed comes here twice, with the same sums; they are added once, below.
                return self.optimizer.scale_loss(self.losses([name], reading, view, batch, sums))

            reading: Reading = model(view, judge if self.asks_layers else None)
            loss = None
            if reading.is_last:
                names = [name for name, term in self.terms.items() if term.layer is None]
                loss = self.losses(names, reading, view, batch, sums)
                sums |= counts(view)
            metrics.add([sums])
            if loss is None:
                return reading.hidden, None
            # The schedule divides by the number of micro batches; our losses are plain sums.
            return loss * len(views), lambda scaled: (scaled, {})

        self._run_schedule(forward_step, views, views[0].tokens.shape)

    def _run_schedule(self, forward_step: Callable[..., Any], items: Sequence[Any], shape: torch.Size) -> None:
        """Run the pipeline schedule over one item for each micro batch of this data-parallel rank, of [B, S]."""
        num_chunks = len(self.homes.stage)
        if num_chunks > 1:
            mcore.group_micro_batches(self.homes.stage[0].config, len(items))
        rows, length = shape
        self.schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(items) for _ in range(num_chunks)] if num_chunks > 1 else iter(items),
            model=self.homes.stage,
            num_microbatches=len(items),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=not torch.is_grad_enabled(),
        )

    def _with_second(self, view: View) -> View:
        seconds = [second for term in self.terms.values() if (second := term.second_view(view)) is not None]
        assert len(seconds) <= 1, "main reads at most two views at a time"
        return side_by_side(view, seconds[0]) if seconds else view

    def losses(self, names: list[str], reading: Reading, view: View, batch: StepBatch, sums: Sums) -> Tensor:
        """The named terms' share of the whole loss (METRO eq. 9) in this micro batch; their sums go into `sums`."""
        found = {}
        for name in names:
            found[name], own = self.terms[name].loss(reading, view, self.layout)
            sums |= own
        return weighted(self.terms.values(), found, batch.step, batch)
