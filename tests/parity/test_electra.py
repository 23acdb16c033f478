"""ELECTRA is a case: on the same weights, transformers' pair has the same losses and gradients (Clark et al., 2020)."""

import re

import pytest
import torch
from torch import Tensor
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from metro_megatron.config.schema import Config, EncoderSizes
from metro_megatron.hf.weights import hf_state_dict
from tests.distributed import run_ranks
from tests.parity.small_run import small_config
from tests.parity.test_gradients import one_step

NAMES = {
    r"^(metro|auxiliary)\.": "electra.",
    r"^auxiliary_head\.decoder": "generator_lm_head",
    r"^auxiliary_head": "generator_predictions",
    r"^rtd_head\.dense": "discriminator_predictions.dense",
    r"^rtd_head": "discriminator_predictions.dense_prediction",
    r"embeddings\.projection": "embeddings_project",
    r"attention\.(query|key|value)": r"attention.self.\1",
    r"(attention\.output|\bintermediate|\d\.output)\.": r"\1.dense.",
    r"(\d\.)attention_norm": r"\1attention.output.LayerNorm",
    r"(\d\.)output_norm": r"\1output.LayerNorm",
    r"\bnorm\.": "LayerNorm.",
}
"""Of our exported model and of transformers' one, replaced in this order."""
POSITIONS, TYPES = (f"electra.embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type"))
REVERSED = "discriminator_predictions.dense_prediction."
"""Ours says original where theirs says replaced: the last layer has the opposite sign."""


def electra_config(config: Config, sizes: EncoderSizes) -> ElectraConfig:
    return ElectraConfig(
        vocab_size=config.model.vocab_size,
        embedding_size=config.model.table_width,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.ffn_hidden_size,
        max_position_embeddings=config.model.max_position_embeddings,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
    )


def of_electra(tensors: dict[str, Tensor], config: Config, encoder: str, head: str) -> dict[str, Tensor]:
    """The trainer's tensors that one of transformers' models has, under its names."""
    found = {}
    for name, tensor in hf_state_dict(tensors, config.model).items():
        if name.startswith((f"{encoder}.", f"{head}.", "metro.embeddings.word_embeddings.")):
            for pattern, new in NAMES.items():
                name = re.sub(pattern, new, name)
            found[name] = -tensor if name.startswith(REVERSED) else tensor
    return found


def test_losses_and_every_gradient_equal_transformers() -> None:
    config = small_config(
        model={
            "embedding_size": 24,
            "auxiliary_hidden_size": 32,
            "auxiliary_num_attention_heads": 2,
            "auxiliary_ffn_hidden_size": 96,
            "relative_bucket": "none",
            "reset_cls": False,
            "shared_embeddings": "token_position_norm",
            "rtd_head": "dense",
            "lm_head": "dense",
            "layer_norm_eps": 1e-12,
        },
        objective={"keep_probability": 0.15, "clm_weight": 0.0},
        data={"row_format": "padded", "micro_batch_size": 24},
    )
    (step,) = run_ranks(one_step, 1, config)
    generator = ElectraForMaskedLM(electra_config(config, config.model.auxiliary))
    discriminator = ElectraForPreTraining(electra_config(config, config.model.main))
    models = ((generator, "auxiliary", "auxiliary_head"), (discriminator, "metro", "rtd_head"))
    segment = torch.randn(24, generator=torch.Generator().manual_seed(1))
    for model, encoder, head in models:
        weights = of_electra(step.weights, config, encoder, head)
        # We have no segments: what theirs adds to every token of the first one is in our positions.
        weights |= {POSITIONS: weights[POSITIONS] - segment, TYPES: torch.stack([segment, torch.zeros(24)])}
        model.load_state_dict(weights)
        model.double().train()
    discriminator.electra.embeddings = generator.electra.embeddings

    batch = step.batch
    labels = batch.tokens.masked_fill(~batch.is_masked, -100)
    shown = batch.is_masked & (batch.masked_tokens == batch.tokens)
    assert shown.any() and not batch.is_real.all(), "some masked tokens are read as they are, and some rows are padded"
    mlm = generator(batch.masked_tokens, batch.is_real.long(), labels=labels).loss
    is_replaced = (step.corrupted != batch.tokens).long()
    rtd = discriminator(step.corrupted, batch.is_real.long(), labels=is_replaced).loss
    (mlm + 50 * rtd).backward()

    assert step.figures["aux_loss"] == pytest.approx(mlm.item(), rel=1e-6)
    assert step.figures["rtd_loss"] == pytest.approx(rtd.item(), rel=1e-6)
    for model, encoder, head in models:
        ours = of_electra(step.gradients, config, encoder, head)
        ours[TYPES] = torch.stack([ours[POSITIONS].sum(0), torch.zeros(24)])
        theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert theirs.keys() == ours.keys() - {"generator_lm_head.weight"}
        for name, expected in theirs.items():
            assert expected is not None, name
            error = (ours[name].double() - expected).norm()
            if expected.norm() < 1e-12:
                assert name.endswith("key.bias") and error < 1e-5, (name, error)
            else:
                assert error < 1e-5 * expected.norm(), (name, error / expected.norm())
