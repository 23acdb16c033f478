"""Initial weights: kinds of modules, eq. 10 by slots, and that name and seed alone decide."""

import pytest
import torch
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.positions_metro import relative_buckets
from metro_megatron.model.init import Unset, scaled_modules, start_of
from metro_megatron.train.trainer import Trainer
from metro_megatron.vocabulary import PAD_ID
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, small_corpus, whole_weights

FACTORS = {0: 0.707, 1: 0.5, 11: 0.204, 23: 0.144, 47: 0.102, 63: 0.088}
SLOTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
TARGETS = {"ffn": (2, 3), "ffn_out": (3,), "residual_out": (1, 3), "none": ()}


def unset(name: str, shape: list[int], model_config: ModelConfig, seed: int = 1, divisor: float = 1.0) -> Unset:
    return Unset(name, shape, torch.nn.Linear(1, 1), divisor, model_config, seed)


def first_values(*changes: dict[str, object]) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """On a lone rank, for each change of the model: all weights, and the divisors of main's matrices by name."""
    found = []
    for change in changes:
        config = small_config(model=change)
        trainer = Trainer(config, small_corpus(config), torch.device("cpu"))
        (main,) = trainer.pair.main
        names = {module: name for name, module in main.named_modules()}
        divisors = {f"main.{names[module]}": value for module, value in scaled_modules(main, config.model)}
        found.append((whole_weights(trainer), divisors))
        trainer.close()
    return found


@pytest.fixture(scope="module")
def values() -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    return run_ranks(first_values, 1, *({"scaled_init_targets": targets} for targets in TARGETS))[0]


@pytest.mark.parametrize("number", range(len(TARGETS)))
def test_slots_of_equation_10(values: list[tuple[dict[str, Tensor], dict[str, float]]], number: int) -> None:
    """Divided are the matrices of the named slots, by sqrt(2 (l + 1)), and nothing else."""
    targets, scaled = list(TARGETS.items())[number]
    weights, divisors = values[number]
    plain = values[-1][0]
    wanted = {
        f"main.block.layers.{layer}.{SLOTS[slot]}": (2 * (layer + 1)) ** 0.5 for layer in range(4) for slot in scaled
    }
    assert divisors == pytest.approx(wanted), targets
    for name, weight in weights.items():
        layer = name.removeprefix("aux.").removeprefix("main.").removesuffix(".weight")
        divisor = wanted.get(f"main.{layer}", 1.0)
        assert torch.equal(weight, plain[name] / divisor), name


@pytest.mark.parametrize(("layer", "factor"), FACTORS.items())
def test_factors_of_equation_10(layer: int, factor: float) -> None:
    matrix = unset("x.weight", [64, 64], ModelConfig(), divisor=(2 * (layer + 1)) ** 0.5)
    assert torch.equal(matrix.matrix(), matrix.normal() / matrix.divisor)
    assert float(matrix.matrix().std() / matrix.normal().std()) == pytest.approx(factor, abs=5e-4)


def test_values(values: list[tuple[dict[str, Tensor], dict[str, float]]]) -> None:
    weights = values[-1][0]
    word = weights["tied.word.weight"]
    assert word.shape == (384, 64)
    assert word[PAD_ID].abs().max() == 0 and word[300:].abs().max() == 0
    assert word[5:300].std() == pytest.approx(0.02, rel=0.02) and word[5:300].mean().abs() < 1e-3
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        elif name != "tied.word.weight":
            assert weight.std() == pytest.approx(0.02, rel=0.3 if weight.numel() < 100 else 0.1), name


def test_name_and_seed_decide() -> None:
    name, shape, model_config = "main.block.layers.7.mlp.linear_fc2.weight", [16, 8], ModelConfig()
    value = unset(name, shape, model_config).normal()
    assert torch.equal(value, unset(name, shape, model_config).normal())
    for other in (unset(name, shape, model_config, seed=2), unset(name.replace("main", "aux"), shape, model_config)):
        assert not torch.equal(value, other.normal())


def test_a_kind_that_nobody_described_is_named() -> None:
    with pytest.raises(AssertionError, match="how in_proj_weight of MultiheadAttention starts"):
        start_of(torch.nn.MultiheadAttention(4, 2), "in_proj_weight")


def test_values_of_other_models() -> None:
    """TUPE's table and projections are as all weights, last norms as all norms, and eq. 10 scales none of them."""
    changes = {"untied_positions": True, "norm_first": True, "shared_lm_bias": True, "shared_embeddings": "none"}
    ((weights, divisors),) = run_ranks(first_values, 1, changes)[0]
    assert "main.embedding.position.weight" not in weights, "nothing reads it"
    for name in ("tied.main_table.untied.position", "tied.main_table.untied.key", "aux.table.untied.query"):
        assert weights[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1), name
        assert not weights.get(f"{name}.bias", torch.zeros(1)).any(), name
    for norm in ("tied.main_table.untied.norm", "main.block.final_layernorm", "aux.block.final_layernorm"):
        assert (weights[f"{norm}.weight"] == 1).all() and (weights[f"{norm}.bias"] == 0).all(), norm
    assert weights["tied.decoder.bias"].shape == (384,) and not weights["tied.decoder.bias"].any()
    word = weights["aux.embedding.word.weight"]
    assert word[PAD_ID].abs().max() == 0 and word[300:].abs().max() == 0
    assert word[5:300].std() == pytest.approx(0.02, rel=0.02)
    assert set(divisors) == {f"main.block.layers.{i}.{SLOTS[slot]}" for i in range(4) for slot in TARGETS["ffn"]}


@pytest.mark.parametrize("reset_cls", [True, False])
@pytest.mark.parametrize("bucket", ["coco", "t5"])
def test_decaying_biases(bucket: str, reset_cls: bool) -> None:
    model_config = ModelConfig(
        relative_bucket=bucket,  # type: ignore[arg-type]
        relative_bias_init="decay",
        reset_cls=reset_cls,
        hidden_size=16,
        num_attention_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        max_position_embeddings=128,
        vocab_size=300,
    )
    start = model_config.position_scheme.start(4)
    assert start is not None
    table = torch.tensor(start)
    pair = MetroForPreTraining(metro_config(model_config))
    for encoder in (pair.metro, pair.auxiliary):
        assert torch.equal(encoder.encoder.relative_attention_bias.weight, table)
    biases = table[relative_buckets(metro_config(model_config), 128, torch.device("cpu"))]
    assert bool(biases[:, 0].abs().max() == 0 and biases[0].abs().max() == 0) == reset_cls
    for distance, start_of_bucket in ((0, 0), (1, 1), (7, 7), (100, 86 if bucket == "coco" else 91)):
        for query, key in ((1, 1 + distance), (1 + distance, 1)):
            assert biases[query, key].tolist() == [-start_of_bucket / 2**head for head in range(4)]


@pytest.mark.parametrize("position_init", ["normal", "zero"])
def test_start_of_absolute_positions(position_init: str) -> None:
    """Of both encoders, here and in transformers; nothing else starts otherwise."""
    plain, changed = run_ranks(first_values, 1, {}, {"position_init": position_init})[0]
    tables = {name for name in plain[0] if name.endswith("position.weight")}
    assert len(tables) == 2
    for name, weight in changed[0].items():
        expected = torch.zeros_like(weight) if position_init == "zero" and name in tables else plain[0][name]
        assert torch.equal(weight, expected), name
    small = ModelConfig(
        position_init=position_init,  # type: ignore[arg-type]
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        vocab_size=300,
    )
    pair = MetroForPreTraining(metro_config(small))
    for embeddings in (pair.metro.embeddings, pair.auxiliary.embeddings):
        assert bool(embeddings.position_embeddings.weight.any()) == (position_init == "normal")
        assert embeddings.norm.weight.all()
