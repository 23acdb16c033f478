"""A small pair: its configuration, random tensors under the trainer's names, a tokenizer, an exported folder."""

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


def trainer_tensors(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the trainer's global names, LayerNorms and biases included; the padded vocabulary too."""
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    table = (model.relative_attention_num_buckets + 1, model.num_attention_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "tied.word.weight": (PADDED_VOCAB_SIZE, hidden),
        "tied.main_table.weight": table,
        "aux.table.weight": table,
        "aux.head.dense.weight": (hidden, hidden),
        "aux.head.dense.bias": (hidden,),
        "aux.head.norm.weight": (hidden,),
        "aux.head.norm.bias": (hidden,),
        "aux.head.decoder.bias": (PADDED_VOCAB_SIZE,),
        "main.rtd_head.weight": (1, hidden),
        "main.rtd_head.bias": (1,),
        "main.clm_head.decoder.bias": (PADDED_VOCAB_SIZE,),
    }
    for encoder, depth in (("main", model.num_layers), ("aux", model.auxiliary_num_layers)):
        shapes[f"{encoder}.embedding.position.weight"] = (model.max_position_embeddings, hidden)
        shapes[f"{encoder}.embedding.norm.weight"] = shapes[f"{encoder}.embedding.norm.bias"] = (hidden,)
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


def write_export(root: Path) -> Path:
    """An exported folder under `root`."""
    write_hf_folder(root / "export", trainer_tensors(), MODEL, write_tokenizer(root / "tokenizer"), {"steps": 7})
    return root / "export"
