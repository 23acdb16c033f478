"""METRO's encoder once more, written down straight from the recipe on the trainer's tensors, one sample at a time.

Legend: S tokens of the sample, H hidden, N heads, K head dimension, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig


def side_bucket(distance: int, model: ModelConfig) -> int:
    """Bucket of a distance among those of its side."""
    half, largest = model.relative_attention_num_buckets // 2, model.relative_attention_max_distance
    exact = half // 2
    if distance < exact:
        return distance
    if model.relative_bucket == "coco":
        ratio = math.log(distance / exact) / math.log((largest - 1) / exact)
        return min(half - 1, exact + math.ceil(ratio * (half - 1 - exact)))
    ratio = math.log(distance / exact) / math.log(largest / exact)
    return min(half - 1, exact + math.floor(ratio * (half - exact)))


def bucket(query: int, key: int, model: ModelConfig) -> int:
    """Row of the table for one pair of places."""
    buckets = model.relative_attention_num_buckets
    is_coco = model.relative_bucket == "coco"
    if query == 0:
        return buckets - 1 if is_coco else buckets // 2
    if key == 0:
        return buckets
    side = side_bucket(abs(key - query), model)
    if is_coco:
        lowest = -side_bucket(model.max_position_embeddings - 1, model)
        return (side if key > query else -side) - lowest
    return side + (buckets // 2 if key > query else 0)


def layer_norm(x: Tensor, tensors: Mapping[str, Tensor], name: str, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + epsilon) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def encode(ids: list[int], tensors: Mapping[str, Tensor], encoder: str, model: ModelConfig) -> Tensor:
    """[S, H] of one sample without padding; encoder is "main" or "aux"."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    is_main = encoder == "main"
    hidden = model.hidden_size if is_main else model.auxiliary_hidden_size or model.hidden_size
    heads = model.num_attention_heads if is_main else model.auxiliary_num_attention_heads or model.num_attention_heads
    size, width = len(ids), hidden // heads
    table = tensors["tied.main_table.weight" if encoder == "main" else "aux.table.weight"]
    rows = torch.tensor([[bucket(i, j, model) for j in range(size)] for i in range(size)])
    x = tensors["tied.word.weight"][ids] + tensors[f"{encoder}.embedding.position.weight"][:size]
    x = layer_norm(x, tensors, f"{encoder}.embedding.norm", model.layer_norm_eps)
    if x.size(-1) != hidden:
        x = linear(x, f"{encoder}.embedding.projection")
    for i in range(model.num_layers if encoder == "main" else model.auxiliary_num_layers):
        layer = f"{encoder}.block.layers.{i}"
        mixed = linear(x, f"{layer}.self_attention.linear_qkv")
        outputs = []
        for head in range(heads):
            start = 3 * width * head  # q, k and v of a head stand together
            q, k, v = (mixed[:, start + width * part : start + width * (part + 1)] for part in range(3))
            scores = q @ k.T / math.sqrt(width) + table[rows, head]
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
        attended = linear(torch.cat(outputs, -1), f"{layer}.self_attention.linear_proj")
        x = layer_norm(x + attended, tensors, f"{layer}.input_layernorm", model.layer_norm_eps)
        changed = linear(gelu(linear(x, f"{layer}.mlp.linear_fc1")), f"{layer}.mlp.linear_fc2")
        x = layer_norm(x + changed, tensors, f"{layer}.pre_mlp_layernorm", model.layer_norm_eps)
    return x


def outputs(
    masked: list[int], noised: list[int], tensors: Mapping[str, Tensor], model: ModelConfig
) -> dict[str, Tensor]:
    """hidden [S, H], mlm and clm [S, V], rtd [S] of one sample."""

    def dense(x: Tensor, head: str) -> Tensor:
        return gelu(x @ tensors[f"{head}.dense.weight"].T + tensors[f"{head}.dense.bias"])

    def decoded(x: Tensor, head: str, is_dense: bool) -> Tensor:
        if is_dense:
            x = layer_norm(dense(x, head), tensors, f"{head}.norm", model.layer_norm_eps)
        word = tensors["tied.word.weight"][: model.vocab_size]
        return x @ word.T + tensors[f"{head}.decoder.bias"][: model.vocab_size]

    hidden = encode(noised, tensors, "main", model)
    judged = dense(hidden, "main.rtd_head") if model.rtd_head == "dense" else hidden
    return {
        "hidden": hidden,
        "mlm": decoded(encode(masked, tensors, "aux", model), "aux.head", is_dense=True),
        "rtd": judged @ tensors["main.rtd_head.weight"][0] + tensors["main.rtd_head.bias"],
        "clm": decoded(hidden, "main.clm_head", model.lm_head == "dense"),
    }
