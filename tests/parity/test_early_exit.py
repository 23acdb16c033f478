"""Early exit against the same written without gathering, in every layout it runs in, and against no exit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metro_megatron.checkpoint.files import iteration_folder
from metro_megatron.config.early_exit import LEVELS
from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch
from metro_megatron.hf.encoder_metro import _masked
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.verify import random_probe
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.model.init import global_parameters
from metro_megatron.train.metrics import MetricSums
from metro_megatron.train.unsharded import trainer_outputs
from tests.checkpoint.tensors import read_model_tensors
from tests.distributed import run_ranks
from tests.parity.small_run import STEPS, Figures, small_config, start, whole_weights
from tests.train.test_trainer import run

LAYERS = [1, 3]
SHARE = 0.7
RISING = "0 -> 0 at step 1 -> 0.6 at step 4"
PADDED = {"row_format": "padded", "micro_batch_size": 24}


def exiting(share: float | str = RISING, weight: float = 0.5, rule: str = "confidence", **concerns: Any) -> Config:
    concerns = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, **concerns}
    return small_config(early_exit={"layers": LAYERS, "share": share, "weight": weight, "rule": rule}, **concerns)


@dataclass
class OneStep:
    """The first step of a run with a single micro batch of padded rows."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    batch: MicroBatch
    corrupted: Tensor
    figures: Figures


def one_step(config: Config) -> OneStep:
    """On a single rank: gradients of all parameters, before the optimizer uses them."""
    trainer = start(config)
    batch = trainer.corpus.training_data(trainer.layout).step_batch(0, 0)
    weights = whole_weights(trainer)
    metrics = MetricSums(trainer.layout, trainer.parts.all_terms)
    (corrupted,) = trainer.step.evaluate(batch, metrics)
    assert metrics.reduce()["average_depth"] == config.model.num_layers, "evaluation reads to the top"
    trainer.optimizer.step = lambda step, *others: None  # type: ignore[method-assign,assignment]
    trainer.step.train(batch, metrics)
    gradients = {
        name: parameter.main_grad.clone()  # type: ignore[attr-defined]
        for prefix, module in trainer.pair.modules()
        for name, parameter in global_parameters(module, prefix)
    }
    figures = metrics.reduce()
    trainer.close()
    return OneStep(weights, gradients, batch.micro_batches[0], corrupted, figures)


def least_sure(logits: Tensor, lengths: Tensor, staying: int) -> Tensor:
    """bool [B, S]: the floor(L staying / LEVELS) tokens of each sample whose |2 sigmoid(r) - 1| is smallest."""
    stays = torch.zeros(logits.shape, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        sureness = (2 * logits[row, :length].sigmoid() - 1).abs().tolist()
        order = sorted(range(length), key=lambda position: sureness[position])
        stays[row, order[: length * staying // LEVELS]] = True
    return stays


def test_every_gradient_equals_layers_that_compute_all_and_keep_what_stays() -> None:
    """x <- where(active, layer(x), x), in float64; exits score whoever goes on, the top everyone."""
    config = exiting(SHARE, model={}, data=PADDED)
    (step,) = run_ranks(one_step, 1, config)
    model = MetroForPreTraining(metro_config(config.model))
    model.load_state_dict(hf_state_dict(step.weights, config.model))
    model.double().train()
    batch, real = step.batch, step.batch.is_real
    is_masked, is_original = batch.masked_tokens != batch.tokens, (step.corrupted == batch.tokens).double()

    def detection(logits: Tensor, where: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(logits[where], is_original[where], reduction="sum")
        return losses / real.sum()

    encoder = model.metro.encoder
    hidden = model.metro.embeddings(model.metro.embeddings.word_embeddings(step.corrupted))
    bias = _masked(encoder._bias(hidden, None), real, None)
    active, exits, depth = real, {}, torch.zeros(real.shape)
    for number, layer in enumerate(encoder.layer, start=1):
        hidden = torch.where(active[..., None], layer(hidden, bias, False)[0], hidden)
        depth += active
        if number in LAYERS:
            logits = model.rtd_head(hidden).squeeze(-1)
            staying = LEVELS - int(SHARE * (LAYERS.index(number) + 1) / len(LAYERS) * LEVELS)
            sure_first = logits.detach().masked_fill(~active, 99.0)  # who has left does not come back
            active = least_sure(sure_first, batch.sample_lengths, staying)
            exits[number] = detection(logits, active)
    rtd = detection(model.rtd_head(hidden).squeeze(-1), real)
    clm = functional.cross_entropy(model.clm_head(hidden)[is_masked], batch.tokens[is_masked])
    mlm = functional.cross_entropy(
        model(batch.masked_tokens, real, noised_input_ids=step.corrupted).mlm_logits[is_masked], batch.tokens[is_masked]
    )
    (mlm + 50 * rtd + clm + 0.5 * 50 * sum(exits.values())).backward()

    figures, gone, replaced = step.figures, ~active & real, (is_original == 0) & real
    assert {f"exit{layer}_loss" for layer in LAYERS} < figures.keys()
    for name, value in {"rtd": rtd, "clm": clm, **{f"exit{number}": loss for number, loss in exits.items()}}.items():
        assert figures[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-5), name
    assert figures["average_depth"] == pytest.approx(float(depth[real].mean())) and figures["average_depth"] < 3
    for name, kind in {"replaced": replaced, "original": real & ~replaced}.items():
        assert figures[f"exited_{name}"] == pytest.approx(float(gone[kind].double().mean())) and gone[kind].any()
    ours = hf_state_dict(step.gradients, config.model)  # linear: it maps gradients as it maps weights
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert expected is not None, name
        error = (ours[name].double() - expected).norm()
        if name.endswith("key.bias"):  # softmax does not see it: its gradient is zero but for rounding
            assert expected.norm() < 1e-12 and error < 1e-4, (name, error)
        else:
            assert error < 3e-5 * expected.norm(), (name, error / expected.norm())


@dataclass
class Record:
    figures: list[Figures]
    weights: dict[str, Tensor]


def train(configs: list[Config]) -> list[Record]:
    """On every rank: all steps of each configuration."""
    records = []
    for config in configs:
        trainer = start(config)
        metrics, figures = MetricSums(trainer.layout, trainer.parts.all_terms), []
        data = trainer.corpus.training_data(trainer.layout)
        for step in range(STEPS):
            batch = data.step_batch(step, trainer.progress.seen_samples)
            trainer.step.train(batch, metrics)
            trainer.progress.seen_samples = batch.end
            figures.append(metrics.reduce())
        trainer.homes.fetch_parameters()
        records.append(Record(figures, whole_weights(trainer)))
        trainer.close()
    return records


FULL = exiting(share=0.0, weight=0.0)
IN_ONE_PROCESS = {
    "packed": exiting(),
    "padded": exiting(data={"row_format": "padded"}),
    "recomputed": exiting(parallel={"recompute": "full"}),
    "control": exiting(rule="random"),
    "full": FULL,
    "none": replace(FULL, early_exit=Config().early_exit),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Record]:
    """Of one process, in one call: a process is slow to start."""
    return dict(zip(IN_ONE_PROCESS, run_ranks(train, 1, list(IN_ONE_PROCESS.values()))[0], strict=True))


def test_no_layout_and_no_row_format_changes_who_leaves(found: dict[str, Record]) -> None:
    """With dropout; tensor and data parallelism, rows, recomputation; weights of all steps, and the control."""
    tensor = {"parallel": {"tensor_model_parallel_size": 2, "recompute": "full"}}
    tensored, its_control = run_ranks(train, 4, [exiting(**tensor), exiting(rule="random", **tensor)])[0]
    one, control = found["packed"], found["control"]
    for wanted, records in ((one, [found["padded"], found["recomputed"], tensored]), (control, [its_control])):
        for number, record in enumerate(records):
            for figures, expected in zip(record.figures, wanted.figures, strict=True):
                expected = {name: value for name, value in expected.items() if name != "non_pad_fraction"}
                assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5), number
            for name, weight in wanted.weights.items():
                torch.testing.assert_close(record.weights[name], weight, rtol=0, atol=1e-6, msg=f"{number} {name}")
    depths = [figures["average_depth"] for figures in one.figures]
    assert depths[0] == 4 > depths[1] > depths[2] > depths[3] == pytest.approx(depths[5], abs=0.1)
    assert depths == [figures["average_depth"] for figures in control.figures], "as many leave at random"
    assert one.figures[5]["rtd_loss"] != control.figures[5]["rtd_loss"]
    # Tokens of one head's least doubt are of both kinds, but not in the shares of chance.
    assert one.figures[5]["exited_replaced"] != pytest.approx(control.figures[5]["exited_replaced"], abs=0.02)


def test_a_capacity_of_all_tokens_is_no_exit_bit_for_bit(found: dict[str, Record]) -> None:
    exits, none = found["full"], found["none"]
    for figures, expected in zip(exits.figures, none.figures, strict=True):
        assert {name: figures[name] for name in expected} == expected
    assert exits.weights.keys() == none.weights.keys()
    assert all(torch.equal(exits.weights[name], weight) for name, weight in none.weights.items())


def run_and_read(config: Config) -> tuple[list[dict[str, Any]], list[str], dict[str, Tensor]]:
    """On a lone rank: what a run logged and said, and what its checkpoint's model says of a probe."""
    lines, said = run(config)
    iteration = iteration_folder(Path(config.train.output), STEPS)
    return lines, said, trainer_outputs(iteration, config, *random_probe(config.model))


def test_a_run_logs_its_exits_and_exports_the_model_of_full_depth(tmp_path: Path) -> None:
    config = exiting(train={"output": str(tmp_path)})
    ((lines, said, outputs),) = run_ranks(run_and_read, 1, config)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        exits = line["exit1_loss"] + line["exit3_loss"]
        whole = line["aux_loss"] + 50 * line["rtd_loss"] + line["clm_loss"] + 0.5 * 50 * exits
        assert line["loss"] == pytest.approx(whole, rel=1e-12)
    shown = next(one for one in said if one.startswith("step 6/6"))
    assert f"exit3 {lines[-1]['exit3_loss']:.4f}" in shown and f"depth {lines[-1]['average_depth']:.3f}" in shown
    model = MetroForPreTraining(metro_config(config.model)).eval()
    tensors = read_model_tensors(iteration_folder(tmp_path, STEPS))
    model.load_state_dict(hf_state_dict(tensors, config.model))
    probe = random_probe(config.model)
    is_real = torch.arange(probe.masked_tokens.size(1)) < probe.lengths[:, None]
    with torch.no_grad():
        exported = model(probe.masked_tokens, is_real, noised_input_ids=probe.noised_tokens)
    torch.testing.assert_close(exported.rtd_logits[is_real], outputs["rtd"][is_real], rtol=0, atol=1e-5)
