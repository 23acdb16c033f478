"""Initial weights as a function of the seed and a parameter's global name: equal for every layout."""

import re
import zlib
from collections.abc import Iterator

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from metro_megatron.config.schema import ModelConfig
from metro_megatron.model.position import bucket_table
from metro_megatron.randomness import Purpose, hash64
from metro_megatron.vocabulary import PAD_ID

SCALED: dict[str, tuple[str, ...]] = {
    "ffn": ("linear_fc1.weight", "linear_fc2.weight"),
    "ffn_out": ("linear_fc2.weight",),
    "residual_out": ("linear_proj.weight", "linear_fc2.weight"),
    "none": (),
}


def global_parameters(module: MegatronModule, prefix: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) with layers numbered from the bottom of the whole encoder, 0-based."""
    for name, parameter in module.named_parameters():
        match = re.match(r"block\.layers\.(\d+)\.(.+)", name)
        if match:
            number = module.block.layers[int(match[1])].layer_number - 1
            name = f"block.layers.{number}.{match[2]}"
        yield prefix + name, parameter


def split_dimension(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that tensor-parallel ranks divide among them; None if each holds the whole."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return int(parameter.partition_dim) if is_split else None  # type: ignore[attr-defined]


@torch.no_grad()
def initialize(module: MegatronModule, prefix: str, model: ModelConfig, seed: int, tensor_group: ProcessGroup) -> None:
    """Fill every parameter of module in place; tensor-parallel ranks take their parts of one whole tensor."""
    for name, parameter in global_parameters(module, prefix):
        split = split_dimension(parameter)
        shape = list(parameter.shape)
        if split is not None:
            shape[split] *= tensor_group.size()
        whole = initial_value(name, shape, model, seed)
        part = whole if split is None else whole.chunk(tensor_group.size(), split)[tensor_group.rank()]
        parameter.copy_(part)


def initial_value(name: str, shape: list[int], model: ModelConfig, seed: int) -> Tensor:
    """The whole tensor of a global name.

    Biases 0; LayerNorm (1, 0); all else N(0, init_method_std), and divided by sqrt(2 (l + 1)) for the matrices of
    layer l that scaled_init_targets names (METRO eq. 10); tables of relative biases as relative_bias_init says. The
    <pad> row and the rows that only pad the vocabulary are 0.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm." in name:
        return torch.ones(shape)
    if name.endswith("table.weight") and model.relative_bias_init == "decay":
        return decaying_biases(model)
    generator = torch.Generator().manual_seed(int(hash64(seed, Purpose.INIT, zlib.crc32(name.encode()))) >> 1)
    value = torch.randn(shape, generator=generator) * model.init_method_std
    if name.endswith("word.weight"):
        value[PAD_ID] = 0
        value[model.vocab_size :] = 0
    return value / scaled_init_divisor(name, model)


def decaying_biases(model: ModelConfig) -> Tensor:
    """[b + 1, heads]: -2^-h times the smallest distance of a bucket; 0 for [CLS] and where there is none."""
    buckets = bucket_table(model)[1:, 1:]
    place = torch.arange(len(buckets))
    distance = (place[None, :] - place[:, None]).abs()
    smallest = torch.full((model.relative_attention_num_buckets + 1,), len(buckets))
    smallest.scatter_reduce_(0, buckets.flatten(), distance.flatten(), "amin")
    smallest[smallest == len(buckets)] = 0
    return -smallest[:, None] * 2.0 ** -torch.arange(model.num_attention_heads)


def scaled_init_divisor(name: str, model: ModelConfig) -> float:
    """sqrt(2 (l + 1)) for a matrix that eq. 10 scales, else 1."""
    match = re.search(r"layers\.(\d+)\.", name)
    if match and name.endswith(SCALED[model.scaled_init_targets]):
        return float((2 * (int(match[1]) + 1)) ** 0.5)
    return 1.0
