"""PDR against its second-order form, torch's own divergences and R3F's, on every kind of output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from metro_megatron.finetune.models import build_model, read_config
from metro_megatron.finetune.pdr import DIVERGENCES, Regularizer, noised_output
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.modeling_metro import MetroForSequenceClassification

SECOND_ORDER = {"symkl": 1, "symkl_detached": 1, "kl": 1 / 2, "js": 1 / 8, "hellinger": 1 / 8}
"""Factors of e^T J^T F J e, F the Fisher information of the output distribution."""
CONFIG = PreTrainedConfig()


class LinearSoftmax(nn.Module):
    """Logits W x of the flattened token embeddings x."""

    def __init__(self, num_tokens: int = 3, width: int = 4, classes: int = 5):
        super().__init__()
        self.embedding = nn.Embedding(7, width).double()
        self.linear = nn.Linear(num_tokens * width, classes).double()

    def forward(self, input_ids: Tensor) -> Mapping[str, Tensor]:
        return {"logits": self.linear(self.embedding(input_ids).flatten(1))}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_the_second_order_form_of_a_linear_softmax(divergence: str, noise: str) -> None:
    torch.manual_seed(0)
    model, ids, radius = LinearSoftmax(), torch.randint(7, (6, 3)), 1e-5
    regularizer = Regularizer(divergence, radius, noise)
    outputs = model(ids)
    torch.manual_seed(1)
    noised = regularizer.noised(model, {"input_ids": ids, "labels": ids[:, 0]}, model.embedding)
    found = regularizer(outputs, noised, ids[:, 0], CONFIG)
    torch.manual_seed(1)
    drawn = torch.empty(6, 3, 4, dtype=torch.float64)
    drawn = drawn.uniform_(-radius, radius) if noise == "uniform" else drawn.normal_(0, radius)
    assert noise == "normal" or 0.9 * radius < drawn.abs().max() <= radius
    p = outputs["logits"].softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    moved = drawn.flatten(1) @ model.linear.weight.T
    expected = SECOND_ORDER[divergence] * torch.einsum("bk,bkl,bl->b", moved, fisher, moved).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert found > 0


def test_divergences_are_torchs_and_gradients_go_where_they_say() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    p, q = (leaf.log_softmax(-1) for leaf in leaves)

    def torchs(target: Tensor, input: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction="none", log_target=True).sum(-1)

    middle = ((p.exp() + q.exp()) / 2).log()
    r3f = torchs(p, q) + torchs(q, p)  # fairseq's sentence_prediction_r3f sums both
    wanted = {
        "symkl": r3f,
        "symkl_detached": torchs(p.detach(), q) + torchs(q.detach(), p),
        "kl": torchs(p, q),
        "js": (torchs(p, middle) + torchs(q, middle)) / 2,
        "hellinger": 1 - (p.exp() * q.exp()).sqrt().sum(-1),  # 1 - Bhattacharyya's coefficient
    }
    assert wanted.keys() == DIVERGENCES.keys()
    for name, expected in wanted.items():
        found = DIVERGENCES[name](p, q)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(one.sum(), leaves, retain_graph=True) for one in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_what_is_compared_follows_the_head() -> None:
    torch.manual_seed(0)
    regularizer = Regularizer("symkl", 0.1, "uniform")

    def by_hand(p: Tensor, q: Tensor) -> Tensor:
        a, b = p.softmax(-1), q.softmax(-1)
        return ((a * (a / b).log()).sum(-1) + (b * (b / a).log()).sum(-1)).mean()

    def found(outputs: dict[str, Tensor], noised: dict[str, Tensor], labels: Any = None, **settings: Any) -> float:
        return regularizer(outputs, noised, labels, PreTrainedConfig(**settings)).item()

    p, q = torch.randn(2, 4, 5, 3).unbind(0)
    labels = torch.tensor([[-100, 1, 0, 2, -100]] * 4)
    tagged = found({"logits": p}, {"logits": q}, labels)
    assert tagged == pytest.approx(by_hand(p[:, 1:4], q[:, 1:4]).item(), rel=1e-4)
    p, q = p[:, 0], q[:, 0]
    classes = by_hand(p, q).item()
    assert found({"logits": p}, {"logits": q}, torch.zeros(4)) == pytest.approx(classes, rel=1e-4)
    # Each of several labels is a coin.
    coins = by_hand(*(torch.stack([one, torch.zeros_like(one)], -1) for one in (p, q))).item()
    several = found({"logits": p}, {"logits": q}, torch.ones(4, 3), problem_type="multi_label_classification")
    assert several == pytest.approx(coins, rel=1e-4)
    # A span is two distributions over positions; where there can be none, the logits are the lowest numbers.
    lowest = torch.finfo(torch.float32).min
    spans = [torch.cat([one, torch.full((4, 2), lowest)], 1) for one in (p, q, q, p)]
    keys = ("start_logits", "end_logits")
    assert found(dict(zip(keys, spans[:2], strict=True)), dict(zip(keys, spans[2:], strict=True))) == pytest.approx(
        classes, rel=1e-4
    )
    numbers = {"problem_type": "regression", "num_labels": 1}
    squared = (p[:, :1] - q[:, :1]).square().mean().item()
    assert found({"logits": p[:, :1]}, {"logits": q[:, :1]}, torch.zeros(4), **numbers) == pytest.approx(squared)


@pytest.mark.parametrize("head", ["sequence_classification", "multiple_choice", "question_answering"])
def test_no_noise_and_no_dropout_is_exactly_nothing(export_folder: Path, head: Any) -> None:
    model = build_model(head, export_folder, read_config(export_folder, {}), False)
    for name in DIVERGENCES:
        ids = torch.randint(5, 300, (2, 3, 7) if head == "multiple_choice" else (2, 7))
        regularizer = Regularizer(name, 0.0, "uniform")
        model.eval()
        outputs = model(ids)
        noised = regularizer.noised(model, {"input_ids": ids}, model.get_input_embeddings())
        assert regularizer(outputs, noised, None, model.config).item() == 0
        model.train()
        noised = regularizer.noised(model, {"input_ids": ids}, model.get_input_embeddings())
        assert regularizer(model(ids), noised, None, model.config) > 0


def test_in_bf16_the_noise_arrives_and_how_much_of_it_counts() -> None:
    """Under autocast weights, embeddings, norms and the sums between layers are fp32: noise of 1e-5, less than a unit
    of bf16 there, changes them all. Products round their input: R of small noise is mostly that of rounding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    config = MetroConfig(vocab_size=1000, num_auxiliary_layers=0, num_labels=3, initializer_range=0.02, **sizes)
    model = MetroForSequenceClassification(config).eval()
    stages = [model.metro.embeddings.norm, *model.metro.encoder.layer]
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    for stage in stages:
        stage.register_forward_hook(see)
    ids = torch.randint(5, 1000, (16, 40))
    ratios, surviving = {}, {}
    for radius in (1e-5, 1e-3):
        regularizer, found = Regularizer("symkl", radius, "uniform"), {}
        for enabled in (False, True):
            seen.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = model(ids)
                torch.manual_seed(1)
                noised = regularizer.noised(model, {"input_ids": ids}, model.get_input_embeddings())
            found[enabled] = regularizer(outputs, noised, None, config).item()
            for clean, changed in zip(seen[: len(stages)], seen[len(stages) :], strict=True):
                assert clean.dtype == torch.float32 and (clean != changed).double().mean() > 0.99
        ratios[radius] = found[True] / found[False]
        surviving[radius] = (seen[0].bfloat16() != seen[len(stages)].bfloat16()).double().mean().item()
    assert surviving == pytest.approx({1e-5: 0.11, 1e-3: 0.94}, abs=0.03)
    assert ratios[1e-3] == pytest.approx(1.05, abs=0.15) and ratios[1e-5] > 50


def test_the_hook_is_gone_afterwards() -> None:
    module = nn.Identity()
    with pytest.raises(RuntimeError), noised_output(module, torch.ones_like):
        assert module(torch.zeros(1)) == 1
        raise RuntimeError
    assert module(torch.zeros(1)) == 0
