"""Initial weights: distribution, eq. 10, and that a name alone decides."""

import pytest
import torch

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.model.init import initial_value, scaled_init_divisor
from metro_megatron.model.position import bucket_table
from metro_megatron.vocabulary import PAD_ID

FACTORS = {0: 0.707, 1: 0.5, 11: 0.204, 23: 0.144, 47: 0.102, 63: 0.088}
MATRICES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.parametrize(("layer", "factor"), FACTORS.items())
def test_factors_of_equation_10(layer: int, factor: float) -> None:
    name = f"main.block.layers.{layer}.mlp.linear_fc1.weight"
    assert 1 / scaled_init_divisor(name, ModelConfig()) == pytest.approx(factor, abs=5e-4)


@pytest.mark.parametrize(
    ("targets", "scaled"), [("ffn", (2, 3)), ("ffn_out", (3,)), ("residual_out", (1, 3)), ("none", ())]
)
def test_targets(targets: str, scaled: tuple[int, ...]) -> None:
    model = ModelConfig(scaled_init_targets=targets)  # type: ignore[arg-type]
    for i, matrix in enumerate(MATRICES):
        divisor = scaled_init_divisor(f"aux.block.layers.3.{matrix}.weight", model)
        assert divisor == (pytest.approx(8**0.5) if i in scaled else 1.0), matrix
        assert scaled_init_divisor(f"aux.block.layers.3.{matrix}.bias", model) == 1.0
    assert scaled_init_divisor("tied.word.weight", model) == 1.0


def test_values() -> None:
    model = ModelConfig(vocab_size=300)
    word = initial_value("tied.word.weight", [384, 768], model, seed=1)
    assert word[PAD_ID].abs().max() == 0 and word[300:].abs().max() == 0
    assert word[5:300].std() == pytest.approx(0.02, rel=0.02) and word[5:300].mean().abs() < 1e-3
    fc2 = initial_value("main.block.layers.7.mlp.linear_fc2.weight", [768, 3072], model, seed=1)
    assert fc2.std() == pytest.approx(0.02 / 4, rel=0.02)
    assert (initial_value("main.embedding.norm.weight", [768], model, 1) == 1).all()
    assert (initial_value("main.rtd_head.bias", [1], model, 1) == 0).all()


def test_name_and_seed_decide() -> None:
    name, shape, model = "main.block.layers.7.mlp.linear_fc2.weight", [16, 8], ModelConfig()
    value = initial_value(name, shape, model, seed=1)
    assert torch.equal(value, initial_value(name, shape, model, seed=1))
    for other in (initial_value(name, shape, model, 2), initial_value(name.replace("main", "aux"), shape, model, 1)):
        assert not torch.equal(value, other)


@pytest.mark.parametrize("bucket", ["coco", "t5"])
def test_decaying_biases(bucket: str) -> None:
    model = ModelConfig(
        relative_bucket=bucket,  # type: ignore[arg-type]
        relative_bias_init="decay",
        num_attention_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        max_position_embeddings=128,
        vocab_size=300,
    )
    table = initial_value("aux.table.weight", [33, 4], model, seed=1)
    pair = MetroForPreTraining(metro_config(model))
    for encoder in (pair.metro, pair.auxiliary):
        assert torch.equal(encoder.encoder.relative_attention_bias.weight, table)
    biases = table[bucket_table(model)]
    assert biases[:, 0].abs().max() == 0 and biases[0].abs().max() == 0
    for distance, start in ((0, 0), (1, 1), (7, 7), (100, 86 if bucket == "coco" else 91)):
        for query, key in ((1, 1 + distance), (1 + distance, 1)):
            assert biases[query, key].tolist() == [-start, -start / 2, -start / 4, -start / 8]
