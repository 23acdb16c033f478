"""A small pair: its configuration, random tensors under the trainer's names, a tokenizer, an exported folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import write_hf_folder
from metro_megatron.tokenizer.training import train_tokenizer

VOCAB_SIZE = 300
PADDED_VOCAB_SIZE = 384
PARTS = ("word", "position", "norm")
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

NARROW: dict[str, Any] = {
    "embedding_size": 20,
    "auxiliary_hidden_size": 18,
    "auxiliary_num_attention_heads": 2,
    "auxiliary_ffn_hidden_size": 30,
    "rtd_head": "dense",
    "lm_head": "dense",
}
"""A narrow token table that both encoders project, a narrower auxiliary, dense heads."""

VARIANTS: dict[str, dict[str, Any]] = {
    "METRO": {},
    "T5's buckets": {"relative_bucket": "t5"},
    "pre-LN": {"norm_first": True},
    "TUPE": {"untied_positions": True},
    "METRO's baseline": {"reset_cls": False, "shared_embeddings": "token_position", "shared_lm_bias": True},
    "METRO with a narrow auxiliary": NARROW,
    "ELECTRA": {"relative_bucket": "none", "reset_cls": False, "shared_embeddings": "token_position_norm", **NARROW},
    "nothing shared, TUPE without relative positions or reset, pre-LN": {
        "shared_embeddings": "none",
        "untied_positions": True,
        "relative_bucket": "none",
        "reset_cls": False,
        "norm_first": True,
        **NARROW,
    },
}
"""Changes of the model by what they make of it; together they have every choice of every option."""


def variant(name: str) -> ModelConfig:
    return replace(MODEL, **VARIANTS[name])


def trainer_tensors(model: ModelConfig = MODEL, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the trainer's global names, LayerNorms and biases included; the padded vocabulary too."""
    main, auxiliary, width = model.main, model.auxiliary, model.table_width
    shapes: dict[str, tuple[int, ...]] = {"main.rtd_head.weight": (1, main.hidden_size), "main.rtd_head.bias": (1,)}
    if model.rtd_head == "dense":
        shapes["main.rtd_head.dense.weight"] = (main.hidden_size, main.hidden_size)
        shapes["main.rtd_head.dense.bias"] = (main.hidden_size,)
    heads = {"aux.head": auxiliary} | ({"main.clm_head": main} if model.lm_head == "dense" else {})
    for head, sizes in heads.items():
        shapes[f"{head}.dense.weight"], shapes[f"{head}.dense.bias"] = (width, sizes.hidden_size), (width,)
        shapes[f"{head}.norm.weight"] = shapes[f"{head}.norm.bias"] = (width,)
    for encoder, sizes in (("main", main), ("aux", auxiliary)):
        home, hidden, inner = homes(encoder, model), sizes.hidden_size, sizes.ffn_hidden_size
        shapes[f"{home['word']}.weight"] = (PADDED_VOCAB_SIZE, width)
        shapes[f"{home['norm']}.weight"] = shapes[f"{home['norm']}.bias"] = (width,)
        shapes[f"{home['decoder']}.bias"] = (PADDED_VOCAB_SIZE,)
        if width != hidden:
            projection = f"{encoder}.embedding.projection"
            shapes[f"{projection}.weight"], shapes[f"{projection}.bias"] = (hidden, width), (hidden,)
        if model.relative_bucket != "none":
            rows = model.relative_attention_num_buckets + model.reset_cls
            shapes[f"{home['table']}.weight"] = (rows, sizes.num_attention_heads)
        if model.untied_positions:
            untied = f"{home['table']}.untied"
            shapes[f"{untied}.position.weight"] = (model.max_position_embeddings + model.reset_cls, hidden)
            shapes[f"{untied}.norm.weight"] = shapes[f"{untied}.norm.bias"] = (hidden,)
            for name in ("query", "key"):
                shapes[f"{untied}.{name}.weight"], shapes[f"{untied}.{name}.bias"] = (hidden, hidden), (hidden,)
        else:
            shapes[f"{home['position']}.weight"] = (model.max_position_embeddings, width)
        if model.norm_first:
            last = f"{encoder}.block.final_layernorm"
            shapes[f"{last}.weight"] = shapes[f"{last}.bias"] = (hidden,)
        for i in range(sizes.num_layers):
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


def homes(encoder: str, model: ModelConfig) -> dict[str, str]:
    """The trainer's modules for what encoders may share; encoder is "main" or "aux"."""
    level = {"none": 0, "token": 1, "token_position": 2, "token_position_norm": 3}[model.shared_embeddings]
    shared = ("word", "position", "norm")[:level]
    own = {part: f"tied.{part}" if part in shared else f"{encoder}.embedding.{part}" for part in PARTS}
    head = "tied" if model.shared_lm_bias else {"main": "main.clm_head", "aux": "aux.head"}[encoder]
    table = {"main": "tied.main_table", "aux": "aux.table"}[encoder]
    return own | {"decoder": f"{head}.decoder", "table": table} | ({"word": "tied.word"} if encoder == "main" else {})


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of VOCAB_SIZE ids trained on a few made-up sentences."""
    units = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9)) + "." for i in range(1, 60)]
    train_tokenizer([[unit] for unit in units], VOCAB_SIZE, folder)
    return folder


def write_export(root: Path, model: ModelConfig = MODEL) -> Path:
    """An exported folder under `root`."""
    tokenizer = write_tokenizer(root / "tokenizer")
    write_hf_folder(root / "export", trainer_tensors(model), model, tokenizer, {"steps": 7})
    return root / "export"
