"""The state of a run as pieces of tensors that have the same names and shapes in every layout.

Weights go by their global names, what the optimizer keeps of each by `optimizer.state.`, its kind, and that name, in
FP32. An optimizer's rank has a range of a parameter's elements: one block of rows, and what is left of a row before and
behind it. It is saved, and loaded, as such: no rank asks another for any of it. megatron-core's format
`fully_reshardable`, whose names and shapes these are, gathers all of it on every rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from metro_megatron import mcore
from metro_megatron.checkpoint.files import check_metadata
from metro_megatron.checkpoint.pieces import Piece, blocks, read_pieces
from metro_megatron.checkpoint.read import OPTIMIZER_PREFIX
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import OWN_SCHEDULE, Optimizer

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is saved of each parameter beside its weights: its master, and two moments."""
FORMAT = {"param_state_sharding_type": "fully_reshardable"}
"""What megatron-core calls these names and shapes."""


@dataclass(frozen=True)
class State:
    """Everything that training changes, as one rank holds it; tensors are the run's own."""

    pieces: list[Piece]
    empty: list[str]
    """Names of what layers of megatron-core expect in a checkpoint beside tensors, and have no use for."""
    common: dict[str, Any]
    """What all ranks have: groups of parameters, steps, loss scales."""


def sharded_state(pair: Pair, optimizer: Optimizer, layout: Layout) -> State:
    """What is saved. No collective call."""
    model = list(of_model(pair, layout))
    weights = [one for one in model if isinstance(one, ShardedTensor)]
    empty = [one.unique_key for one in model if isinstance(one, ShardedObject)]
    pieces = [_whole(one) for one in weights]
    for entry, start, master, state in _shards(optimizer, weights):
        for kind in STATES:
            # Muon has one moment: the other is saved as zeros.
            flat = master if kind == "param" else state[kind] if kind in state else torch.zeros_like(state["exp_avg"])
            pieces += _pieces(f"{OPTIMIZER_PREFIX}state.{kind}.{entry.key}", entry, start, flat)
    common = {number: {**one.state_dict(), **FORMAT} for number, one in enumerate(optimizer.both)}
    return State(pieces, empty, {"optimizer": copy.deepcopy(common)})


def load_weights_into(folder: Path, pair: Pair, layout: Layout) -> None:
    """Read the weights alone of a checkpoint whose files are whole. Raises UserError."""
    weights = [_whole(one) for one in of_model(pair, layout) if isinstance(one, ShardedTensor)]
    read_pieces(folder, check_metadata(folder), weights)


def load_state(folder: Path, pair: Pair, optimizer: Optimizer, layout: Layout, summed: Collection[str]) -> None:
    """Read a checkpoint into the pair and the optimizer; summed, and what is raised: as read_pieces."""
    common = torch.load(folder / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)["optimizer"]
    weights = [one for one in of_model(pair, layout) if isinstance(one, ShardedTensor)]
    for number, one in enumerate(optimizer.both):
        _create_moments(one)
        common[number] = {name: value for name, value in common[number].items() if not name.startswith("param_state")}
        _keep_own_rates(one, common[number]["optimizer"]["param_groups"])
    with torch.no_grad():
        optimizer.chained.load_state_dict(common)
    for one in optimizer.both:
        mcore.fuse(one.optimizer)  # an older checkpoint may say otherwise, and all parameters share one step
    wanted: list[Piece] = []
    masters: dict[int, str] = {}
    for entry, start, master, state in _shards(optimizer, weights):
        prefix = f"{OPTIMIZER_PREFIX}state."
        if entry.data.dtype == torch.float32:
            # The weights are the masters, and those of other ranks too, whatever the run's weights were when it saved.
            masters[id(entry)] = f"{prefix}param.{entry.key}"
        else:
            wanted += _pieces(f"{prefix}param.{entry.key}", entry, start, master)
        for kind in state.keys() & set(STATES):
            wanted += _pieces(f"{prefix}{kind}.{entry.key}", entry, start, state[kind])
    wanted += [_whole(one, masters.get(id(one), one.key)) for one in weights]
    read_pieces(folder, check_metadata(folder), wanted, summed)


def of_model(pair: Pair, layout: Layout) -> Iterator[ShardedTensor | ShardedObject]:
    """megatron-core's description of every parameter, and of what linear layers keep beside them.

    Of Transformer Engine's in FP8 that would be pickled scales that each step makes anew. They are neither saved nor
    loaded: unpickling a file from elsewhere runs what is in it.
    """
    for (name, module), (prefix, _) in zip(pair.named(), pair.modules(), strict=True):
        replicas = layout.replica if name in pair.shared else layout.data
        tensors = module.sharded_state_dict(
            prefix="", metadata={"dp_cp_group": replicas, "non_homogeneous_layers": True}
        )
        add_prefix_for_sharding(tensors, prefix)
        for one in tensors.values():
            assert isinstance(one, ShardedTensor | ShardedObject), one
            yield one


def _whole(entry: ShardedTensor, name: str = "") -> Piece:
    """All that this rank has of a parameter."""
    assert entry.prepend_axis_num == 0 and entry.data is not None
    return Piece(name or entry.key, tuple(entry.global_shape), tuple(entry.global_offset), entry.data.detach())


def _pieces(name: str, entry: ShardedTensor, start: int, flat: Tensor) -> Iterator[Piece]:
    """Of elements of this rank's part of a parameter, from one on."""
    flat, done = flat.detach().view(-1), 0
    for offsets, sizes in blocks(entry.local_shape, start, start + flat.numel()):
        size = math.prod(sizes)
        place = tuple(own + offset for own, offset in zip(entry.global_offset, offsets, strict=True))
        yield Piece(name, tuple(entry.global_shape), place, flat[done : done + size].view(sizes))
        done += size


def _shards(
    optimizer: Optimizer, weights: list[ShardedTensor]
) -> Iterator[tuple[ShardedTensor, int, Tensor, dict[str, Tensor]]]:
    """(parameter, first element, master, the optimizer's state) of what this rank updates."""
    entries = {one.data: one for one in weights}
    for one in optimizer.both:
        _create_moments(one)
        for parameter, (group, index) in one.model_param_group_index_map.items():
            master = one.optimizer.param_groups[group]["params"][index]
            start = one._get_model_param_range_map(parameter)["param"].start
            yield entries[parameter], start, master, one.optimizer.state[master]


def _create_moments(optimizer: DistributedOptimizer) -> None:
    """Adam creates its moments in the first step; a state saved or loaded before that needs them too."""
    adam = optimizer.optimizer
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _keep_own_rates(optimizer: DistributedOptimizer, saved: list[dict[str, Any]]) -> None:
    """Groups' shares of the learning rate, and its schedule, are the run's options', which may be others than when it
    was saved.

    They are one of the entries by which megatron-core finds a checkpoint's groups again.
    """
    keys = ("wd_mult", "is_expert_parallel", "is_decoupled_lr")
    there = {tuple(group[key] for key in keys): group for group in saved}
    for own in optimizer.optimizer.param_groups:
        same = there.get(tuple(own[key] for key in keys))
        if same is None:  # of parameters that had the rate of all
            all_others = next(group for group in saved if group["wd_mult"] == own["wd_mult"])
            same = {**all_others, **{key: own[key] for key in keys}}
            saved.append(same)
        same["lr_mult"] = own["lr_mult"]
        same[OWN_SCHEDULE] = own.get(OWN_SCHEDULE, False)
