"""One optimizer step in two phases (docs/walk.md, rows 7 to 10).

Phase 1: each pipeline rank runs the whole auxiliary model on its share of the micro batches, forward and
backward, and samples replacements. The samples are exchanged. Phase 2: the main model runs megatron-core's
pipeline schedule on the corrupted micro batches. No gradient crosses the sampling, so nothing else links them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.corruption.auxiliary import corrupt, propose
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.model.heads import Decoding
from metro_megatron.model.pair import Pair
from metro_megatron.objective.losses import replaced_token_detection_sum, vocabulary_statistics
from metro_megatron.parallel.exchange import exchange, share
from metro_megatron.parallel.homes import Homes
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer, Update
from metro_megatron.randomness import Purpose, hash64
from metro_megatron.train.metrics import MetricSums, Sums, auxiliary_sums, main_sums


class Step:
    """The two phases over one pair; the same code trains and evaluates."""

    def __init__(self, config: Config, layout: Layout, pair: Pair, homes: Homes, optimizer: Optimizer):
        self.config = config
        self.layout = layout
        self.pair = pair
        self.homes = homes
        self.optimizer = optimizer
        self.schedule = get_forward_backward_func()

    def train(self, batch: StepBatch, metrics: MetricSums) -> Update:
        """Run both phases, reduce and update."""
        self._set_training(True)
        seed = int(hash64(self.config.train.seed, Purpose.DROPOUT, batch.step)) >> 2
        dropout_seed = torch.tensor([seed], device=self.layout.device)
        micro_batches = [
            replace(micro_batch.to(self.layout.device), dropout_seed=dropout_seed)
            for micro_batch in batch.micro_batches
        ]
        self.homes.begin_step()
        with self.homes.quiet():
            sampled = self._auxiliary_phase(micro_batches, batch, metrics)
        self.homes.end_auxiliary_phase()
        corrupted = self._exchange(micro_batches, sampled)
        with self.homes.quiet():
            self._main_phase(micro_batches, corrupted, batch, metrics)
        self.homes.end_main_phase()
        return self.optimizer.step(batch.step)

    @torch.no_grad()
    def evaluate(self, batch: StepBatch, metrics: MetricSums) -> list[Tensor]:
        """Both phases forward only, without dropout; returns the corrupted ids [B, S] of each micro batch.

        The caller has fetched the parameters.
        """
        self._set_training(False)
        micro_batches = [micro_batch.to(self.layout.device) for micro_batch in batch.micro_batches]
        sampled = self._auxiliary_phase(micro_batches, batch, metrics)
        corrupted = self._exchange(micro_batches, sampled)
        self._main_phase(micro_batches, corrupted, batch, metrics)
        return corrupted

    def _set_training(self, is_training: bool) -> None:
        for _, module in self.pair.modules():
            module.train(is_training)

    def _auxiliary_phase(self, micro_batches: list[MicroBatch], batch: StepBatch, metrics: MetricSums) -> list[Tensor]:
        """Samples [M] of this pipeline rank's share of the micro batches."""
        group = self.layout.tensor
        sampled = []
        for j in share(len(micro_batches), self.layout.pipeline):
            micro_batch = micro_batches[j]
            proposal = propose(self.homes.auxiliary, micro_batch, self.config.model, group)
            if torch.is_grad_enabled():
                self.optimizer.scale_loss(proposal.loss / max(batch.num_masked, 1)).backward()
            targets = micro_batch.masked_targets
            metrics.add([auxiliary_sums(proposal.loss, proposal.predicted, proposal.sampled, targets)])
            sampled.append(proposal.sampled)
        return sampled

    def _exchange(self, micro_batches: list[MicroBatch], sampled: list[Tensor]) -> list[Tensor]:
        counts = [micro_batch.masked_index.numel() for micro_batch in micro_batches]
        everyone = exchange(sampled, counts, self.layout.pipeline)
        return [corrupt(*one) for one in zip(micro_batches, everyone, strict=True)]

    def _main_phase(
        self, micro_batches: list[MicroBatch], corrupted: list[Tensor], batch: StepBatch, metrics: MetricSums
    ) -> None:
        """The pipeline schedule over all micro batches of this data-parallel rank."""
        pairs = list(zip(corrupted, micro_batches, strict=True))

        def forward_step(data: Iterator[tuple[Tensor, MicroBatch]], model: torch.nn.Module):
            tokens, micro_batch = next(data)
            output = model(tokens, micro_batch)
            if isinstance(output, Tensor):  # not the last stage
                return output, None
            loss, sums = self.main_loss(output, tokens, micro_batch, batch)
            # The schedule divides by the number of micro batches; our losses are plain sums.
            return loss * len(micro_batches), lambda scaled: (scaled, sums)

        num_chunks = len(self.homes.stage)
        rows, length = micro_batches[0].tokens.shape
        sums = self.schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(pairs) for _ in range(num_chunks)] if num_chunks > 1 else iter(pairs),
            model=self.homes.stage,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=not torch.is_grad_enabled(),
        )
        metrics.add(sums)

    def main_loss(
        self, output: tuple[Tensor, Decoding], tokens: Tensor, micro_batch: MicroBatch, batch: StepBatch
    ) -> tuple[Tensor, Sums]:
        """Main's share of eq. 9 from (RTD logits [S, B], the CLM head at masks), and its sums."""
        rtd_logits, decoding = output
        weights, group = self.config.objective, self.layout.tensor
        is_replaced = (tokens != micro_batch.tokens).t()
        rtd = replaced_token_detection_sum(rtd_logits, ~is_replaced, micro_batch.is_real.t())
        targets = micro_batch.masked_targets
        found = vocabulary_statistics(decoding, targets, self.config.model.vocab_size, group)
        clm = found.loss.sum()
        sums = main_sums(rtd, clm, rtd_logits, is_replaced, micro_batch)
        sums["clm_correct"] = (found.predicted == targets).sum()
        loss = weights.rtd_weight * rtd / batch.num_tokens + weights.clm_weight * clm / max(batch.num_masked, 1)
        return loss, sums
