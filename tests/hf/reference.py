"""METRO's encoder once more, written down straight from the recipe on the trainer's tensors, one sample at a time.

Legend: S tokens of the sample, H hidden, N heads, K head dimension, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from tests.hf.pair import homes


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
    if query == 0 and model.reset_cls:
        return buckets - 1 if is_coco else buckets // 2
    if key == 0 and model.reset_cls:
        return buckets
    side = side_bucket(abs(key - query), model)
    if is_coco:
        lowest = -side_bucket(model.max_position_embeddings - 1, model)
        return (side if key > query else -side) - lowest
    return side + (buckets // 2 if key > query else 0)


def tupe_rows(query: int, key: int, model: ModelConfig) -> tuple[int, int]:
    """Rows of TUPE's position table for one pair of places: with a reset, row 0 is <s> to all, row 1 all to <s>."""
    if not model.reset_cls:
        return query, key
    if query == 0:
        return 0, 0
    return (1, 1) if key == 0 else (query + 1, key + 1)


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

    sizes = model.main if encoder == "main" else model.auxiliary
    size, heads = len(ids), sizes.num_attention_heads
    width = sizes.hidden_size // heads
    home = homes(encoder, model)
    added = torch.zeros(heads, size, size, dtype=tensors["main.rtd_head.bias"].dtype)
    if model.relative_bucket != "none":
        rows = torch.tensor([[bucket(i, j, model) for j in range(size)] for i in range(size)])
        added = added + tensors[f"{home['table']}.weight"][rows].permute(2, 0, 1)
    x = tensors[f"{home['word']}.weight"][ids]
    if model.untied_positions:
        untied = f"{home['table']}.untied"
        p = layer_norm(tensors[f"{untied}.position.weight"], tensors, f"{untied}.norm", model.layer_norm_eps)
        q, k = (linear(p, f"{untied}.{name}").unflatten(1, (heads, width)) for name in ("query", "key"))
        pairs = torch.tensor([[tupe_rows(i, j, model) for j in range(size)] for i in range(size)])
        added = added + (q[pairs[..., 0]] * k[pairs[..., 1]]).sum(-1).permute(2, 0, 1) / math.sqrt(2 * width)
    else:
        x = x + tensors[f"{home['position']}.weight"][:size]
    x = layer_norm(x, tensors, home["norm"], model.layer_norm_eps)
    if x.size(-1) != sizes.hidden_size:
        x = linear(x, f"{encoder}.embedding.projection")

    def attend(x: Tensor, layer: str) -> Tensor:
        mixed = linear(x, f"{layer}.self_attention.linear_qkv")
        outputs = []
        for head in range(heads):
            start = 3 * width * head  # q, k and v of a head stand together
            q, k, v = (mixed[:, start + width * part : start + width * (part + 1)] for part in range(3))
            scores = q @ k.T / math.sqrt(2 * width if model.untied_positions else width) + added[head]
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
        return linear(torch.cat(outputs, -1), f"{layer}.self_attention.linear_proj")

    def feed(x: Tensor, layer: str) -> Tensor:
        return linear(gelu(linear(x, f"{layer}.mlp.linear_fc1")), f"{layer}.mlp.linear_fc2")

    for i in range(model.num_layers if encoder == "main" else model.auxiliary_num_layers):
        layer = f"{encoder}.block.layers.{i}"
        for sublayer, norm in ((attend, "input_layernorm"), (feed, "pre_mlp_layernorm")):
            if model.norm_first:
                x = x + sublayer(layer_norm(x, tensors, f"{layer}.{norm}", model.layer_norm_eps), layer)
            else:
                x = layer_norm(x + sublayer(x, layer), tensors, f"{layer}.{norm}", model.layer_norm_eps)
    if model.norm_first:
        x = layer_norm(x, tensors, f"{encoder}.block.final_layernorm", model.layer_norm_eps)
    return x


def outputs(
    masked: list[int], noised: list[int], tensors: Mapping[str, Tensor], model: ModelConfig
) -> dict[str, Tensor]:
    """hidden [S, H], mlm and clm [S, V], rtd [S] of one sample."""

    def dense(x: Tensor, head: str) -> Tensor:
        return gelu(x @ tensors[f"{head}.dense.weight"].T + tensors[f"{head}.dense.bias"])

    def decoded(x: Tensor, encoder: str, head: str, is_dense: bool) -> Tensor:
        if is_dense:
            x = layer_norm(dense(x, head), tensors, f"{head}.norm", model.layer_norm_eps)
        home, size = homes(encoder, model), model.vocab_size
        return x @ tensors[f"{home['word']}.weight"][:size].T + tensors[f"{home['decoder']}.bias"][:size]

    hidden = encode(noised, tensors, "main", model)
    judged = dense(hidden, "main.rtd_head") if model.rtd_head == "dense" else hidden
    return {
        "hidden": hidden,
        "mlm": decoded(encode(masked, tensors, "aux", model), "aux", "aux.head", is_dense=True),
        "rtd": judged @ tensors["main.rtd_head.weight"][0] + tensors["main.rtd_head.bias"],
        "clm": decoded(hidden, "main", "main.clm_head", model.lm_head == "dense"),
    }
