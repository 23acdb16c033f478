"""Phase 1 gave each pipeline rank the samples of its own micro batches; phase 2 needs all of them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def share(num_micro_batches: int, pipeline: ProcessGroup) -> range:
    """Indices of the micro batches whose auxiliary pass this pipeline rank runs: p, p + P, ..."""
    return range(pipeline.rank(), num_micro_batches, pipeline.size())


def exchange(own: list[Tensor], counts: list[int], pipeline: ProcessGroup) -> list[Tensor]:
    """All micro batches' sampled ids, in order, on every pipeline rank.

    own: ids [M_j] int64 of this rank's share, in order; counts: M_j of every micro batch.
    """
    if pipeline.size() == 1:
        return own
    num_ranks = pipeline.size()
    # One tensor of one shape from every rank: ranks with fewer micro batches send an empty slot.
    slots = -(-len(counts) // num_ranks)
    width = max(1, *counts)
    device = own[0].device if own else _device(pipeline)
    mine = torch.zeros(slots, width, dtype=torch.int64, device=device)
    for slot, ids in enumerate(own):
        mine[slot, : ids.numel()] = ids
    everyone = torch.empty(num_ranks * slots, width, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(everyone, mine, group=pipeline)
    # Rank p sent micro batches p, p + P, ...: slot first, then rank, is their order.
    by_micro_batch = everyone.view(num_ranks, slots, width).transpose(0, 1).flatten(0, 1)
    return [by_micro_batch[j, :count] for j, count in enumerate(counts)]


def _device(group: ProcessGroup) -> torch.device:
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else torch.device(torch.cuda.current_device())
