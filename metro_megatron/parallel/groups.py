"""The groups of the two homes, as megatron-core wants them named, and how a home's gradients come together."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads as reduce_sequence_parallel_gradients,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from metro_megatron.parallel.layout import Layout


def shared_groups(layout: Layout) -> ProcessGroupCollection:
    """Groups of the shared home: replicated over data-parallel and pipeline ranks, in no pipeline."""
    return _groups(layout, layout.replica, layout.solo, layout.tensor)


def stage_groups(layout: Layout) -> ProcessGroupCollection:
    """Groups of the stage home: replicated over data-parallel ranks only."""
    return _groups(layout, layout.data, layout.pipeline, layout.model)


def _groups(layout: Layout, data, pipeline, model) -> ProcessGroupCollection:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp, groups.pp, groups.mp, groups.tp_ep_pp = layout.tensor, pipeline, model, model
    groups.dp = groups.dp_cp = groups.expt_dp = data
    groups.intra_dist_opt = layout.world  # one gradient norm over both homes
    groups.embd = groups.pos_embd = layout.solo  # ties are inside a home: nothing to reduce between stages
    return groups


def finish_gradients(ddps: Iterable[DistributedDataParallel], config: TransformerConfig, layout: Layout) -> None:
    """Wait for a home's gradient sums, then add up what sequence parallelism left in parts."""
    ddps = list(ddps)
    for ddp in ddps:
        ddp.finish_grad_sync()
    reduce_sequence_parallel_gradients(ddps, config, layout.tensor)
