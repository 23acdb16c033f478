"""A small pair: its configuration, random tensors under the trainer's names, a tokenizer, an exported folder."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import write_hf_folder
from metro_megatron.tokenizer.training import train_tokenizer

VOCAB_SIZE = 300
PADDED_VOCAB_SIZE = 384
WORDS = ("the", "a", "cat", "dog", "bird", "sees", "likes", "finds", "old", "green", "house", "river", "good", "bad")

MODEL = ModelConfig(
    hidden_size=24,
    num_attention_heads=3,
    ffn_hidden_size=40,
    num_layers=3,
    auxiliary_num_layers=2,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=40,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=24,
)

NARROW = replace(
    MODEL,
    embedding_size=20,
    auxiliary_hidden_size=18,
    auxiliary_num_attention_heads=2,
    auxiliary_ffn_hidden_size=30,
    rtd_head="dense",
    lm_head="dense",
)
"""As ELECTRA's pair: a narrow token table that both encoders project, a narrower auxiliary, dense heads."""


def trainer_tensors(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the trainer's global names, LayerNorms and biases included; the padded vocabulary too."""
    hidden, buckets = model.hidden_size, model.relative_attention_num_buckets + 1
    width, narrow = model.embedding_size or hidden, model.auxiliary_hidden_size or hidden
    auxiliary_heads = model.auxiliary_num_attention_heads or model.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        "tied.word.weight": (PADDED_VOCAB_SIZE, width),
        "tied.main_table.weight": (buckets, model.num_attention_heads),
        "aux.table.weight": (buckets, auxiliary_heads),
        "aux.head.dense.weight": (width, narrow),
        "aux.head.dense.bias": (width,),
        "aux.head.norm.weight": (width,),
        "aux.head.norm.bias": (width,),
        "aux.head.decoder.bias": (PADDED_VOCAB_SIZE,),
        "main.rtd_head.weight": (1, hidden),
        "main.rtd_head.bias": (1,),
        "main.clm_head.decoder.bias": (PADDED_VOCAB_SIZE,),
    }
    if model.rtd_head == "dense":
        shapes |= {"main.rtd_head.dense.weight": (hidden, hidden), "main.rtd_head.dense.bias": (hidden,)}
    if model.lm_head == "dense":
        shapes |= {"main.clm_head.dense.weight": (width, hidden), "main.clm_head.dense.bias": (width,)}
        shapes |= {"main.clm_head.norm.weight": (width,), "main.clm_head.norm.bias": (width,)}
    inner_of_auxiliary = model.auxiliary_ffn_hidden_size or model.ffn_hidden_size
    for encoder, depth, hidden, inner in (
        ("main", model.num_layers, hidden, model.ffn_hidden_size),
        ("aux", model.auxiliary_num_layers, narrow, inner_of_auxiliary),
    ):
        shapes[f"{encoder}.embedding.position.weight"] = (model.max_position_embeddings, width)
        shapes[f"{encoder}.embedding.norm.weight"] = shapes[f"{encoder}.embedding.norm.bias"] = (width,)
        if width != hidden:
            shapes[f"{encoder}.embedding.projection.weight"] = (hidden, width)
            shapes[f"{encoder}.embedding.projection.bias"] = (hidden,)
        for i in range(depth):
            layer = f"{encoder}.block.layers.{i}"
            for name, rows, columns in (
                ("self_attention.linear_qkv", 3 * hidden, hidden),
                ("self_attention.linear_proj", hidden, hidden),
                ("mlp.linear_fc1", inner, hidden),
                ("mlp.linear_fc2", hidden, inner),
            ):
                shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = (rows, columns), (rows,)
            for name in ("input_layernorm", "pre_mlp_layernorm"):
                shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (hidden,)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: tensor + 1 if "norm.weight" in name else tensor for name, tensor in tensors.items()}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of VOCAB_SIZE ids trained on a few made-up sentences."""
    units = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9)) + "." for i in range(1, 60)]
    train_tokenizer([[unit] for unit in units], VOCAB_SIZE, folder)
    return folder


def write_export(root: Path, model: ModelConfig = MODEL) -> Path:
    """An exported folder under `root`."""
    write_hf_folder(root / "export", trainer_tensors(model), model, write_tokenizer(root / "tokenizer"), {"steps": 7})
    return root / "export"
