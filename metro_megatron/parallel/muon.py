"""Muon for the matrices of one home: each is whole on one replica, which orthogonalizes it for all.

Momenta and masters lie in the flat shards of megatron-core's distributed optimizer, as Adam's do, so that norm,
clipping and checkpoints are the same for both. Only the orthogonalization needs whole matrices: directions take the
gradients' place in their buffer, are gathered there, and what a matrix's owner makes of them is sent to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _adjust_lr as adjusted_rate
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz


@dataclass(frozen=True)
class Matrix:
    """A 2-D weight of a layer."""

    weight: torch.nn.Parameter
    """What this tensor-parallel rank has of it."""
    head_dim: int = 0
    """K where it is q, k and v of N heads, [N 3 K, H], which are three matrices; 0 where it is one."""
    ranks: int = 1
    """Tensor-parallel ranks among which its dimension `split` is divided."""
    split: int = 0

    @property
    def shape(self) -> torch.Size:
        """Of what is orthogonalized, whole."""
        sizes = list(self.weight.shape)
        sizes[self.split] *= self.ranks
        return torch.Size([sizes[0] // self.pieces, sizes[1]])

    @property
    def pieces(self) -> int:
        return 3 if self.head_dim else 1

    @property
    def cost(self) -> int:
        """Of a Newton-Schulz step, in no unit: in the smaller dimension m and the larger n, m^2 n twice and m^3."""
        small, large = sorted(self.shape)
        return self.pieces * small**2 * (2 * large + small)

    def orthogonalized(self, direction: Tensor) -> Tensor:
        """What torch.optim.Muon makes of the whole direction, in bf16."""
        if not self.head_dim:
            return _orthogonalized(direction)
        by_kind = direction.unflatten(0, (-1, 3, self.head_dim)).transpose(0, 1).flatten(1, 2)
        made = torch.stack([_orthogonalized(one) for one in by_kind])
        return made.unflatten(1, (-1, self.head_dim)).transpose(0, 1).flatten(0, 2)


def _orthogonalized(direction: Tensor) -> Tensor:
    return newton_schulz(direction, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)


def matrices_of(modules: Iterable[torch.nn.Module], tensor: ProcessGroup) -> list[Matrix]:
    """The 2-D weights of all layers: no table, no head, no embedding's projection."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, TransformerLayer)]
    return [
        Matrix(weight, _head_dim(layer, weight), tensor.size(), weight.partition_dim)  # type: ignore[attr-defined]
        for layer in layers
        for weight in layer.parameters()
        if weight.dim() == 2
    ]


def _head_dim(layer: TransformerLayer, weight: torch.nn.Parameter) -> int:
    attention = layer.self_attention
    return attention.hidden_size_per_attention_head if weight is attention.linear_qkv.weight else 0


class Muon:
    """torch.optim.Muon's update of a home's matrices, which are in parameter groups of its own: with a `momentum`.

    A direction's length is match_rms_adamw's: its root mean square is 0.2 of the rate, as Adam's is about, so that one
    rate and one weight decay are for both.
    """

    def __init__(self, home: DistributedOptimizer, matrices: list[Matrix], tensor: ProcessGroup):
        self.home = home
        self.matrices = matrices
        self.tensor = tensor
        self.replicas: ProcessGroup = home.data_parallel_group
        self.owners = shared_out([matrix.cost for matrix in matrices], self.replicas.size())
        """The replica that orthogonalizes each matrix."""
        weights = {matrix.weight for matrix in matrices}
        self.buckets = [
            bucket for buffer in home.buffers for bucket in buffer.buckets if not weights.isdisjoint(bucket.params)
        ]
        for _, _, master, _ in self._shards():
            # By the names of Adam, whose second moment there is none of.
            state = {"step": torch.zeros((), device=master.device), "exp_avg": torch.zeros_like(master)}
            home.optimizer.state[master] = state

    def step(self, divisor: Tensor, is_skipped: Tensor) -> None:
        """From gradients over `divisor`, unless is_skipped is 1. A collective call."""
        skips = is_skipped.bool()
        for _, group, master, buffer in self._shards():
            state = self.home.optimizer.state[master]
            assert master.grad is not None
            gradient = master.grad / divisor
            momentum = state["exp_avg"].lerp(gradient, 1 - group["momentum"])
            buffer.copy_(gradient.lerp(momentum, group["momentum"]))
            state["exp_avg"].copy_(torch.where(skips, state["exp_avg"], momentum))
            state["step"] += 1 - is_skipped
        self._orthogonalize()
        for matrix, group, master, buffer in self._shards():
            rate = group["lr"]
            updated = master * (1 - rate * group["weight_decay"])
            updated.add_(buffer, alpha=-adjusted_rate(rate, "match_rms_adamw", matrix.shape))
            master.copy_(torch.where(skips, master, updated))

    def _shards(self) -> Iterator[tuple[Matrix, dict[str, Any], Tensor, Tensor]]:
        """Where this replica has a piece of a matrix: its group, its master [n], its place in the gradients [n]."""
        for matrix in self.matrices:
            place = self.home.model_param_group_index_map.get(matrix.weight)
            if place is not None:
                group = self.home.optimizer.param_groups[place[0]]
                own = self.home._get_model_param_range_map(matrix.weight)["param"]
                gradients: Tensor = matrix.weight.main_grad  # type: ignore[attr-defined]
                yield matrix, group, group["params"][place[1]], gradients.view(-1)[own.start : own.end]

    def _orthogonalize(self) -> None:
        """Of directions in shards, in the gradients' buffers, make orthogonal ones, whole on every replica."""
        rank, size = self.replicas.rank(), self.replicas.size()
        for bucket in self.buckets:
            own = shard_buffer(bucket.grad_data, size)[rank]
            dist.all_gather_into_tensor(bucket.grad_data, own, group=self.replicas)
        directions: list[Tensor] = [matrix.weight.main_grad for matrix in self.matrices]  # type: ignore[attr-defined]
        for matrix, owner, direction in zip(self.matrices, self.owners, directions, strict=True):
            if owner == rank:  # the same on all tensor-parallel ranks, which all make the whole of it
                parts = matrix.orthogonalized(self._whole(matrix, direction)).chunk(matrix.ranks, matrix.split)
                direction.copy_(parts[self.tensor.rank()])
        sent = [
            dist.broadcast(direction, group=self.replicas, group_src=owner, async_op=True)
            for owner, direction in zip(self.owners, directions, strict=True)
        ]
        for work in sent:
            work.wait()

    def _whole(self, matrix: Matrix, part: Tensor) -> Tensor:
        """In bf16, to which the orthogonalization rounds what it reads."""
        part = part.bfloat16()
        parts = [torch.empty_like(part) for _ in range(matrix.ranks)]
        dist.all_gather(parts, part, group=self.tensor)
        return torch.cat(parts, matrix.split)


def shared_out(costs: list[int], ranks: int) -> list[int]:
    """Who does each: the largest first, to whoever has least to do."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners
