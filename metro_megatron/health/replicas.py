"""Whether ranks that hold the same parameters hold the same bits: they rely on equal arithmetic, nothing joins them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from metro_megatron.model.encoder import Pair
from metro_megatron.model.init import global_parameters, split_dimension
from metro_megatron.parallel.layout import Layout

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def diverged(pair: Pair, layout: Layout) -> list[str]:
    """Global names of parameters of which some rank holds other bits than one that should hold the same.

    Compared over the data-parallel ranks, those of the shared home over the pipeline's too, and where they are whole
    over the tensor-parallel ranks. The caller has fetched the parameters. A collective call that waits.
    """
    found = set()
    shared = [(f"{name}.", module) for name, module in pair.shared.items()]
    for modules, group in ((shared, layout.replica), ([("main.", chunk) for chunk in pair.main], layout.data)):
        own = [one for prefix, module in modules for one in global_parameters(module, prefix)]
        whole = [one for one in own if split_dimension(one[1]) is None]
        found |= _different(own, group) | _different(whole, layout.tensor)
    everyone: list[set[str]] = [set()] * layout.world.size()
    dist.all_gather_object(everyone, found, group=layout.world)
    return sorted(set().union(*everyone))


def _different(parameters: list[tuple[str, torch.nn.Parameter]], group: ProcessGroup) -> set[str]:
    if not parameters or group.size() == 1:
        return set()
    sums = torch.stack([_sum_of_bits(parameter) for _, parameter in parameters])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return {name for (name, _), differs in zip(parameters, (least != most).tolist(), strict=True) if differs}


def _sum_of_bits(parameter: Tensor) -> Tensor:
    """int64, modulo 2^64; each number's bits times an odd number of its own, so that their places count."""
    bits = parameter.detach().contiguous().view(-1).view(_BITS[parameter.element_size()]).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
