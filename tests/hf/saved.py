"""Checkpoint folders as megatron-core writes them on two ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from metro_megatron.checkpoint_files import write_integrity
from metro_megatron.parallel import cpu
from tests.hf.pair import trainer_tensors


def save_on_this_rank(folder: Path) -> None:
    """Save the tensors with their first dimension split over the ranks, and an optimizer's state beside them."""
    cpu.install()
    rank, size = dist.get_rank(), dist.get_world_size()
    state: dict[str, object] = {}
    for name, tensor in trainer_tensors().items():
        if tensor.size(0) % size or name.endswith("word.weight"):
            part, offsets, replica = tensor, (), rank
        else:
            part, offsets, replica = tensor.chunk(size)[rank].clone(), ((0, rank, size),), 0
        if name.startswith("aux.head"):
            part = part.bfloat16()
        state[name] = ShardedTensor.from_rank_offsets(name, part, *offsets, replica_id=replica)
    moment = torch.ones(4)
    state["moment"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", moment, replica_id=rank)
    state["extra"] = ShardedObject("main.x._extra_state", None, (1,), (0,), replica_id=rank)
    state["step"] = 7
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    if rank == 0:
        write_integrity(folder)
