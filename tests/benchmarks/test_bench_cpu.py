"""The plain pair that the CPU step is measured against computes the same, and the benchmark runs."""

import csv
import re
from pathlib import Path

import pytest
import torch

from benchmarks.bench_cpu import main
from benchmarks.plain_pair import PaddedBatch, PlainPair, auxiliary_loss, optimizer_of, sample, train_step
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.model.init import global_parameters
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.trainer import Trainer
from metro_megatron.vocabulary import NUM_SPECIALS
from tests.parity.small_run import VOCAB_SIZE, small_config, start

NAMES = (
    (r"tied\.word\.", "word."),
    (r"tied\.main_table\.", "main.relative."),
    (r"aux\.table\.", "auxiliary.relative."),
    (r"aux\.head\.decoder\.bias", "mlm_bias"),
    (r"main\.clm_head\.decoder\.bias", "clm_bias"),
    (r"aux\.head\.dense\.", "mlm.0."),
    (r"aux\.head\.norm\.", "mlm.2."),
    (r"main\.rtd_head\.", "rtd."),
    (r"^aux\.", "auxiliary."),
    (r"\.embedding\.", "."),
    (r"\.block\.", "."),
    (r"self_attention\.linear_qkv", "qkv"),
    (r"self_attention\.linear_proj", "projection"),
    (r"input_layernorm", "attention_norm"),
    (r"pre_mlp_layernorm", "mlp_norm"),
    (r"mlp\.linear_fc1", "inner"),
    (r"mlp\.linear_fc2", "outer"),
)


def plain_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trainer's, under the plain pair's names."""
    weights = {}
    for prefix, module in trainer.pair.modules():
        for name, parameter in global_parameters(module, prefix):
            for ours, plain in NAMES:
                name = re.sub(ours, plain, name)
            has_ids = name in ("word.weight", "mlm_bias", "clm_bias")
            weights[name] = parameter.detach()[:VOCAB_SIZE] if has_ids else parameter.detach()
    return weights


def test_the_plain_pair_has_the_same_losses() -> None:
    config = small_config()
    trainer = start(config)
    try:
        batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
        metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
        corrupted = trainer.step.evaluate(batch, metrics)
        wanted = metrics.reduce()
        pair = PlainPair(config.model)
        pair.load_state_dict(plain_weights(trainer))
    finally:
        trainer.close()
    batches = [PaddedBatch.of(one) for one in batch.micro_batches]
    losses = torch.zeros(3)
    with torch.no_grad():
        for padded, micro_batch, tokens in zip(batches, batch.micro_batches, corrupted, strict=True):
            mlm = auxiliary_loss(pair.auxiliary_logits(padded), padded)
            rtd, clm = pair.main_losses(padded, tokens.flatten()[micro_batch.masked_index])
            losses += torch.stack([mlm / batch.num_masked, rtd / batch.num_tokens, clm / batch.num_masked])
    assert losses.tolist() == pytest.approx([wanted[f"{name}_loss"] for name in ("aux", "rtd", "clm")], rel=2e-6)
    optimizer = optimizer_of(pair, config)
    first, *_, last = (sum(train_step(pair, optimizer, config, batches)) for _ in range(8))
    assert last < first


def test_plain_samples_are_no_specials() -> None:
    logits = torch.zeros(4, 12)
    logits[:, NUM_SPECIALS - 1], logits[:2, 9] = 1e4, 1e3
    drawn = sample(logits)
    assert (drawn >= NUM_SPECIALS).all() and (drawn[:2] == 9).all()


@pytest.mark.long
def test_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call_with_options(main, ["--sizes", "demo", "--rounds", "3", "--cores", "2", "--output", str(tmp_path / "cpu")])
    with (tmp_path / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["program"] for row in rows] == ["plain", "ours"] * 3
    assert all(float(row["tokens_per_s"]) > 0 < float(row["time_ratio"]) for row in rows)
    assert "wrote" in capsys.readouterr().out
