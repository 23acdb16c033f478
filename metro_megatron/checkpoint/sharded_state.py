"""The state of a run as megatron-core's sharded tensors, free of the layout that wrote it.

megatron-core 0.16's `fully_reshardable` format needs help in six places when the optimizer is torch's Adam, or Muon:
1. after loading, all parameters share one `step` tensor on the host, to which Adam would add once per parameter;
2. padded bucket ends are cut off the joined buckets but not off the positions used to slice them;
3. replica ids must come from the home's own replicas;
4. moments must exist before a state can be described;
5. loading one parameter's state expects a `step` that the format keeps elsewhere;
6. every parameter must have two moments to save, of which Muon's has one: the other is saved as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from metro_megatron import mcore
from metro_megatron.model.encoder import Pair
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Optimizer

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(pair: Pair, optimizer: Optimizer, layout: Layout, is_loading: bool) -> dict[str, Any]:
    """Everything that training changes; keys are global names. A collective call."""
    state = model_state(pair, layout)
    distributed = [optimizer.shared, optimizer.stage]
    for one in distributed:
        _create_moments(one)
        _save_two_moments(one)
    with _unpadded_positions(distributed):
        state["optimizer"] = optimizer.chained.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(OPTIMIZER_FORMAT)
        )
    return state


def model_state(pair: Pair, layout: Layout) -> dict[str, Any]:
    """The parameters alone, by the name of each module."""
    state = {}
    for (name, module), (prefix, _) in zip(pair.named(), pair.modules(), strict=True):
        replicas = layout.replica if name in pair.shared else layout.data
        metadata = {"dp_cp_group": replicas, "non_homogeneous_layers": True}
        tensors = module.sharded_state_dict(prefix="", metadata=metadata)
        for key in _extra_states(tensors):
            tensors[key].data = None
        add_prefix_for_sharding(tensors, prefix)
        state[name] = tensors
    return state


def _extra_states(tensors: dict[str, Any]) -> list[str]:
    """What linear layers keep beside parameters: of Transformer Engine's in FP8, pickled scales that each step makes
    anew. Neither saved nor loaded: unpickling a file from elsewhere runs what is in it."""
    return [key for key in tensors if key.endswith("._extra_state")]


@torch.no_grad()
def load_model_state(pair: Pair, state: dict[str, Any]) -> None:
    """Put loaded parameters into place; a missing or unexpected key is an error."""
    for name, module in pair.named():
        module.load_state_dict({**state[name], **dict.fromkeys(_extra_states(state[name]))}, strict=True)


@torch.no_grad()
def load_state(pair: Pair, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put a loaded `sharded_state` into place."""
    load_model_state(pair, state)
    distributed = [optimizer.shared, optimizer.stage]
    for number, one in enumerate(distributed):
        _keep_own_step(one)
        _keep_own_rates(one, state["optimizer"][number]["optimizer"]["param_groups"])
    optimizer.chained.load_state_dict(state["optimizer"])
    for one in distributed:
        mcore.fuse(one.optimizer)  # an older checkpoint may say otherwise


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


def _save_two_moments(optimizer: DistributedOptimizer) -> None:
    """Give the writer of one parameter zeros for a second moment that it has not."""
    plain = type(optimizer)._get_main_param_and_optimizer_states

    def states(model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        own = plain(optimizer, model_param)
        return own if "exp_avg_sq" in own else {**own, "exp_avg_sq": torch.zeros_like(own["exp_avg"])}

    optimizer._get_main_param_and_optimizer_states = states


def _keep_own_rates(optimizer: DistributedOptimizer, saved: list[dict[str, Any]]) -> None:
    """Groups' shares of the learning rate are the run's options', which may be others than when it was saved.

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


def _keep_own_step(optimizer: DistributedOptimizer) -> None:
    """Give the loader of one parameter the step that this parameter already has."""
    plain = type(optimizer)._set_main_param_and_optimizer_states

    def load(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, index = optimizer.model_param_group_index_map[model_param]
        own = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][index]]
        plain(optimizer, model_param, {**tensors, "step": own["step"]})

    optimizer._set_main_param_and_optimizer_states = load


@contextmanager
def _unpadded_positions(optimizers: list[DistributedOptimizer]) -> Iterator[None]:
    """Positions of parameters as if buckets had no padding at their ends."""
    kept = [(buffer, buffer.param_index_map) for optimizer in optimizers for buffer in optimizer.buffers]
    for buffer, index in kept:
        padding, before = 0, []
        for bucket in buffer.buckets:
            before.append(padding)
            padding += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in index.items()
        }
    try:
        yield
    finally:
        for buffer, index in kept:
            buffer.param_index_map = index
