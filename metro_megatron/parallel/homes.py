"""The two homes of parameters: their gradient buffers, and when each communicates.

A parameter lives in one home. The shared home (tied and auxiliary parameters) is replicated over the
data-parallel and pipeline ranks, the stage home over the data-parallel ranks. Every gradient is a plain sum.

Hooks never steer the shared home's communication: a borrowed parameter collects gradients in both phases,
its hook counts depend on the number of micro batches, and a rank may have no auxiliary micro batch at all.
The boundaries of the phases do: all gathers of parameters start with the step and stage's hide behind
phase 1; the auxiliary's reduction hides behind phase 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from metro_megatron import mcore
from metro_megatron.config.schema import Config
from metro_megatron.parallel.groups import finish_gradients, shared_groups, stage_groups
from metro_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Homes:
    """The wrapped modules of one rank, grouped by home."""

    tied: DistributedDataParallel
    auxiliary: DistributedDataParallel
    stage: list[DistributedDataParallel]
    auxiliary_config: TransformerConfig
    stage_config: TransformerConfig
    layout: Layout
    overlap: bool

    @classmethod
    def build(
        cls,
        config: Config,
        layout: Layout,
        shared: tuple[MegatronModule, MegatronModule],
        stage: list[MegatronModule],
    ) -> Homes:
        """Wrap shared = (tied, auxiliary) and this stage's chunks; their configurations stay theirs."""
        tied, auxiliary = shared
        of_shared, of_stage = shared_groups(layout), stage_groups(layout)
        homes = cls(
            tied=mcore.wrap(tied, tied.config, config, of_shared),
            auxiliary=mcore.wrap(auxiliary, auxiliary.config, config, of_shared),
            stage=[mcore.wrap(chunk, chunk.config, config, of_stage) for chunk in stage],
            auxiliary_config=auxiliary.config,
            stage_config=stage[0].config,
            layout=layout,
            overlap=config.parallel.overlap,
        )
        if homes.overlap:
            quiet = [chunk.no_sync for chunk in homes.stage]
            homes.stage_config.no_sync_func = quiet if len(quiet) > 1 else quiet[0]
        return homes

    @property
    def shared(self) -> list[DistributedDataParallel]:
        return [self.tied, self.auxiliary]

    @property
    def all(self) -> list[DistributedDataParallel]:
        return [*self.shared, *self.stage]

    def begin_step(self) -> None:
        """Forget the last gradients and fetch the shared home's updated parameters."""
        for ddp in self.all:
            ddp.zero_grad_buffer()
        if self.overlap:
            for ddp in self.all:  # one order on all ranks
                ddp.start_param_sync()
            for ddp in self.shared:
                _wait_for_parameters(ddp)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No communication of the shared home while its gradients are collected."""
        with self.tied.no_sync(), self.auxiliary.no_sync():
            yield

    def end_auxiliary_phase(self) -> None:
        """The auxiliary's gradients are complete; stage's parameters are needed now."""
        if self.overlap:
            self.auxiliary.start_grad_sync()
            for ddp in self.stage:
                _wait_for_parameters(ddp)

    def end_main_phase(self) -> None:
        """All gradients are complete: wait until every rank has its sums."""
        if self.overlap:
            self.tied.start_grad_sync()
        finish_gradients(self.shared, self.auxiliary_config, self.layout)
        finish_gradients(self.stage, self.stage_config, self.layout)

    def fetch_parameters(self) -> None:
        """Complete every rank's copy of the parameters: before evaluation, checkpoints and export.

        With overlap the copies of the last update are otherwise only fetched by the next step.
        """
        if self.overlap:
            for ddp in self.all:
                ddp.start_param_sync(force_sync=True)


def _wait_for_parameters(ddp: DistributedDataParallel) -> None:
    for group in ddp.bucket_groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
