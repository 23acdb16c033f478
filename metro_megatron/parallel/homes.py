"""The two homes of parameters: their gradient buffers, and when each communicates.

A parameter lives in one home. The shared home (what both phases use, and what trains in phase 1) is replicated over the
data-parallel and pipeline ranks, the stage home over the data-parallel ranks. Every gradient is a plain sum.

Hooks never steer the shared home's communication: a borrowed parameter collects gradients in both phases,
its hook counts depend on the number of micro batches, and a rank may have no micro batch to corrupt at all.
The boundaries of the phases do: all gathers of parameters start with the step and stage's hide behind
phase 1; the reduction of what only phase 1 trains hides behind phase 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads as reduce_sequence_parallel_gradients,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Homes:
    """The wrapped modules of one rank, grouped by home."""

    shared: dict[str, DistributedDataParallel]
    """By name; `both_phases` names the one that phase 2 uses, too."""
    stage: list[DistributedDataParallel]
    both_phases: str
    layout: Layout
    overlap: bool

    @classmethod
    def build(
        cls,
        config: Config,
        layout: Layout,
        shared: Mapping[str, MegatronModule],
        stage: Sequence[MegatronModule],
        both_phases: str,
    ) -> Homes:
        """Wrap the shared modules and this stage's chunks; their configurations stay theirs."""
        homes = cls(
            shared={
                name: mcore.wrap(module, module.config, config, layout.shared_groups) for name, module in shared.items()
            },
            stage=[mcore.wrap(chunk, chunk.config, config, layout.stage_groups) for chunk in stage],
            both_phases=both_phases,
            layout=layout,
            overlap=config.parallel.overlap,
        )
        if homes.overlap:
            quiet = [chunk.no_sync for chunk in homes.stage]
            homes.stage[0].config.no_sync_func = quiet if len(quiet) > 1 else quiet[0]
        return homes

    @property
    def all(self) -> list[DistributedDataParallel]:
        return [*self.shared.values(), *self.stage]

    @property
    def only_in_phase_1(self) -> list[DistributedDataParallel]:
        """Of the shared home, what phase 2 does not use."""
        return [ddp for name, ddp in self.shared.items() if name != self.both_phases]

    @property
    def misses_backward(self) -> bool:
        """Whether a parameter here took no part in the first backward passes: megatron-core begins no other ones."""
        groups = [group for ddp in self.all for group in ddp.bucket_groups]
        return any(one.is_first_batch and 0 < len(one.per_param_grad_ready_counts) < len(one.params) for one in groups)

    def begin_step(self) -> None:
        """Forget the last gradients and fetch the shared home's updated parameters."""
        for ddp in self.all:
            ddp.zero_grad_buffer()
        if self.overlap:
            for ddp in self.all:  # one order on all ranks
                ddp.start_param_sync()
            for ddp in self.shared.values():
                _wait_for_parameters(ddp)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No communication of the shared home while its gradients are collected."""
        with ExitStack() as stack:
            for ddp in self.shared.values():
                stack.enter_context(ddp.no_sync())
            yield

    @contextmanager
    def corrupting(self) -> Iterator[None]:
        """`quiet`, and no communication of stage's gradients: main's layers may learn in phase 1, too."""
        with ExitStack() as stack:
            stack.enter_context(self.quiet())
            for ddp in self.stage:
                stack.enter_context(ddp.no_sync())
            yield

    def end_corruption_phase(self) -> None:
        """Gradients of what only phase 1 uses are complete; stage's parameters are needed now."""
        if self.overlap:
            for ddp in self.only_in_phase_1:
                ddp.start_grad_sync()
            for ddp in self.stage:
                _wait_for_parameters(ddp)

    def end_main_phase(self) -> None:
        """All gradients are complete: wait until every rank has its sums."""
        if self.overlap:
            self.shared[self.both_phases].start_grad_sync()
        _finish_gradients(self.shared.values(), self.shared[self.both_phases].config, self.layout)
        _finish_gradients(self.stage, self.stage[0].config, self.layout)

    def end_step(self) -> None:
        """Every rank has updated its shards: give them to the others, which with overlap the next step does."""
        if not self.overlap:
            for ddp in self.all:
                ddp.start_param_sync()

    def fetch_parameters(self) -> None:
        """Complete every rank's copy of the parameters: before evaluation, checkpoints and export.

        With overlap the copies of the last update are otherwise only fetched by the next step.
        """
        if self.overlap:
            for ddp in self.all:
                ddp.start_param_sync(force_sync=True)


def _wait_for_parameters(ddp: DistributedDataParallel) -> None:
    for group in ddp.bucket_groups:
        # Every gather has been started already; megatron-core would start the next bucket's from here.
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _finish_gradients(ddps: Iterable[DistributedDataParallel], config: TransformerConfig, layout: Layout) -> None:
    """Wait for a home's gradient sums, then add up what sequence parallelism left in parts."""
    ddps = list(ddps)
    for ddp in ddps:
        ddp.finish_grad_sync()
    reduce_sequence_parallel_gradients(ddps, config, layout.tensor)
