"""Initial weights as a function of the seed and a parameter's global name, or given: equal for every layout.

The kind of the module that owns a parameter says how it starts, the slot it sits in whether eq. 10 scales it; the name
only keys the random numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from metro_megatron.config.schema import ModelConfig
from metro_megatron.model.linear import TRANSFORMER_ENGINE
from metro_megatron.model.norm import LayerNorm
from metro_megatron.model.position import Positions
from metro_megatron.randomness import Purpose, hash64

SCALED: dict[str, tuple[str, ...]] = {
    "ffn": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "ffn_out": ("mlp.linear_fc2",),
    "residual_out": ("self_attention.linear_proj", "mlp.linear_fc2"),
    "none": (),
}
"""Slots of a layer whose matrices eq. 10 scales, by model.scaled_init_targets."""


@dataclass(frozen=True)
class Unset:
    """A parameter that waits for its first values, which all tensor-parallel ranks draw whole."""

    name: str
    """Global."""
    shape: list[int]
    """Whole."""
    owner: torch.nn.Module
    divisor: float
    """sqrt(2 (l + 1)) for a matrix of layer l that eq. 10 scales, else 1."""
    model_config: ModelConfig
    seed: int

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape)

    def ones(self) -> Tensor:
        return torch.ones(self.shape)

    def normal(self) -> Tensor:
        """N(0, init_method_std)."""
        key = zlib.crc32(self.name.encode())
        generator = torch.Generator().manual_seed(int(hash64(self.seed, Purpose.INIT, key)) >> 1)
        return torch.randn(self.shape, generator=generator) * self.model_config.init_method_std

    def matrix(self) -> Tensor:
        """Normal, and scaled where METRO's eq. 10 says so."""
        return self.normal() / self.divisor

    def vocabulary(self) -> Tensor:
        """Normal, but for <pad> and the rows that only pad the vocabulary."""
        value = self.normal()
        value[self.model_config.pad_token_id] = 0
        value[self.model_config.vocab_size :] = 0
        return value

    def positions(self) -> Tensor:
        """Normal, or zero where model.position_init says so."""
        return self.zeros() if self.model_config.position_init == "zero" else self.normal()

    def biases(self) -> Tensor:
        """As the position scheme says."""
        assert isinstance(self.owner, Positions)
        start = self.owner.scheme.start(self.shape[1])
        return self.normal() if start is None else torch.tensor(start)


KINDS: tuple[tuple[tuple[type[torch.nn.Module], ...], Mapping[str, Callable[[Unset], Tensor]]], ...] = (
    ((LayerNorm, torch.nn.LayerNorm), {"weight": Unset.ones, "bias": Unset.zeros}),
    (
        (ColumnParallelLinear, RowParallelLinear, *TRANSFORMER_ENGINE, torch.nn.Linear),
        {"weight": Unset.matrix, "bias": Unset.zeros},
    ),
    ((VocabParallelEmbedding,), {"weight": Unset.vocabulary}),
    ((torch.nn.Embedding,), {"weight": Unset.positions}),
    ((Positions,), {"weight": Unset.biases}),
)
"""How each parameter of a kind of module starts. A module that joins two kinds has the names of both."""


@torch.no_grad()
def initialize(
    module: MegatronModule,
    prefix: str,
    model_config: ModelConfig,
    seed: int,
    tensor_group: ProcessGroup,
    given: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill every parameter of module in place with its `starting_parts`."""
    for parameter, part in starting_parts(module, prefix, model_config, seed, tensor_group, given):
        parameter.copy_(part)


def starting_parts(
    module: MegatronModule,
    prefix: str,
    model_config: ModelConfig,
    seed: int,
    tensor_group: ProcessGroup,
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Every parameter of module, and this rank's part of one whole tensor in FP32, or as it is given.

    given: whole tensors by global name of what does not start at random, read one after the other.
    """
    divisors = dict(scaled_modules(module, model_config))
    for name, local_name, parameter in _named(module, prefix):
        split = split_dimension(parameter)
        shape = list(parameter.shape)
        if split is not None:
            shape[split] *= tensor_group.size()
        owner_name, _, own_name = local_name.rpartition(".")
        owner = module.get_submodule(owner_name)
        unset = Unset(name, shape, owner, divisors.get(owner, 1.0), model_config, seed)
        whole = given[name] if given is not None and name in given else start_of(owner, own_name)(unset)
        yield parameter, _part_of_rank(whole, split, tensor_group)


def _part_of_rank(whole: Tensor, split: int | None, tensor_group: ProcessGroup) -> Tensor:
    return whole if split is None else whole.chunk(tensor_group.size(), split)[tensor_group.rank()]


def start_of(owner: torch.nn.Module, own_name: str) -> Callable[[Unset], Tensor]:
    """How the parameter that owner calls own_name starts."""
    for classes, starts in KINDS:
        if isinstance(owner, classes) and own_name in starts:
            return starts[own_name]
    raise AssertionError(f"nothing says how {own_name} of {type(owner).__name__} starts: KINDS needs a line")


def scaled_modules(module: torch.nn.Module, model_config: ModelConfig) -> Iterator[tuple[torch.nn.Module, float]]:
    """(linear layer, sqrt(2 (l + 1))) for what eq. 10 scales in layer l, counted from 0 over the whole encoder."""
    for layer in module.modules():
        if isinstance(layer, TransformerLayer):
            for slot in SCALED[model_config.scaled_init_targets]:
                yield layer.get_submodule(slot), float((2 * layer.layer_number) ** 0.5)


def global_parameters(module: MegatronModule, prefix: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) with layers numbered from the bottom of the whole encoder, 0-based."""
    for name, _, parameter in _named(module, prefix):
        yield name, parameter


def _named(module: MegatronModule, prefix: str) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(global name, name in module, parameter)."""
    for local_name, parameter in module.named_parameters():
        name = local_name
        match = re.match(r"block\.layers\.(\d+)\.(.+)", local_name)
        if match:
            number = module.block.layers[int(match[1])].layer_number - 1
            name = f"block.layers.{number}.{match[2]}"
        yield prefix + name, local_name, parameter


def split_dimension(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that tensor-parallel ranks divide among them; None if each holds the whole."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return int(parameter.partition_dim) if is_split else None  # type: ignore[attr-defined]
