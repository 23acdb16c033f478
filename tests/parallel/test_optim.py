"""Updates of both homes against torch's AdamW and Muon, and what a gradient that is not finite does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metro_megatron.config.schema import Config, OptimizerConfig
from metro_megatron.model.init import global_parameters
from metro_megatron.parallel.optim import Update
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

SPOILED = "aux.head.dense.weight"


def reference(options: OptimizerConfig, copies: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """torch's optimizers of whole parameters by global name; each group's `lr` is its peak."""
    betas = {
        True: (options.auxiliary_adam_beta1 or options.adam_beta1, options.auxiliary_adam_beta2 or options.adam_beta2),
        False: (options.adam_beta1, options.adam_beta2),
    }
    rates = {True: options.auxiliary_lr or options.lr, False: options.lr}
    kinds = {True: options.auxiliary_matrices, False: options.matrices}
    of_muon = {True: options.auxiliary_muon_lr or rates[True], False: options.muon_lr or options.lr}
    adam, muon = [], []
    for name, one in copies.items():
        is_auxiliary = name.startswith("aux.")
        if one.dim() == 2 and ".layers." in name and kinds[is_auxiliary] == "muon":
            muon.append({"params": [one], "lr": of_muon[is_auxiliary]})
        else:
            decay = options.weight_decay if one.dim() > 1 or options.decay_all else 0.0
            group = {"params": [one], "weight_decay": decay, "betas": betas[is_auxiliary], "lr": rates[is_auxiliary]}
            adam.append(group)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, eps=options.adam_eps)]
    if muon:
        momentum, decay = options.muon_momentum, options.weight_decay
        optimizers.append(
            torch.optim.Muon(muon, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def cut(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """q, k and v [H, H] of a matrix [4 3 K, H] that holds them head by head; anything else as it is."""
    if not name.endswith("linear_qkv.weight"):
        return {name: whole}
    kinds = whole.view(4, 3, -1, whole.size(1)).unbind(1)
    return {f"{name}.{kind}": one.flatten(0, 1) for kind, one in zip("qkv", kinds, strict=True)}


def updated(
    config: Config, steps: int, spoil: bool
) -> tuple[list[Update], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Updates from random gradients; weights after them, q, k and v apart; and those of torch's optimizers."""
    trainer = start(config)
    named = {
        name: parameter
        for prefix, module in trainer.pair.modules()
        for name, parameter in global_parameters(module, prefix)
    }

    def now() -> dict[str, torch.Tensor]:
        return {part: one.detach().clone() for name, whole in named.items() for part, one in cut(name, whole).items()}

    options = config.optimizer
    copies = {name: torch.nn.Parameter(one) for name, one in now().items()}
    optimizers = reference(options, copies)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator, updates = torch.Generator().manual_seed(1), []
    for step in range(steps):
        trainer.homes.begin_step()
        for name, parameter in named.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]
            for part, one in cut(name, gradient).items():
                copies[part].grad = one.clone()
        if spoil:
            named[SPOILED].main_grad[0, 0] = math.nan  # type: ignore[attr-defined]
        trainer.homes.end_corruption_phase()
        trainer.homes.end_main_phase()
        updates.append(trainer.optimizer.step(step).read())
        if not spoil:
            torch.nn.utils.clip_grad_norm_(copies.values(), options.clip_grad or math.inf)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = updates[-1].learning_rate * (peak / options.lr)
            for optimizer in optimizers:
                optimizer.step()
    trainer.homes.fetch_parameters()
    result = updates, now(), {name: one.detach() for name, one in copies.items()}
    trainer.close()
    return result


@pytest.mark.parametrize(("clip_grad", "decay_all"), [(1.0, False), (0.0, True)])
def test_updates_are_those_of_adamw(clip_grad: float, decay_all: bool) -> None:
    """Rates of the warm-up, one norm over both homes, decay of matrices only or of all."""
    config = small_config(optimizer={"clip_grad": clip_grad, "decay_all": decay_all, "weight_decay": 0.1})
    (found,) = run_ranks(updated, 1, config, 3, False)
    updates, weights, expected = found
    assert [update.learning_rate for update in updates] == [5e-4, 1e-3, 1e-3]
    for update in updates:
        assert update.grad_norm == pytest.approx(math.hypot(update.shared_grad_norm, update.stage_grad_norm))
        assert update.grad_norm > 100 and not update.is_skipped
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


OWN = {"auxiliary_lr": 3e-3, "auxiliary_adam_beta1": 0.8, "auxiliary_adam_beta2": 0.9}
MUON = {"matrices": "muon", "auxiliary_matrices": "muon"}


@pytest.mark.parametrize(
    "options",
    [
        OWN,
        {"auxiliary_adam_beta2": 0.9},
        {**MUON, "muon_lr": 2e-2, "muon_momentum": 0.9, **OWN},
        {"auxiliary_matrices": "muon", "auxiliary_muon_lr": 1e-2},
    ],
)
def test_each_of_the_pair_has_its_own_optimizer(options: dict[str, Any]) -> None:
    """Rates, betas and Muon by model, the shared table at main's; matrices are torch.optim.Muon's to the bit."""
    config = small_config(optimizer={"clip_grad": 0.0, "weight_decay": 0.1, **options})
    (found,) = run_ranks(updated, 1, config, 3, False)
    _, weights, expected = found
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        model = "auxiliary_matrices" if name.startswith("aux.") else "matrices"
        if options.get(model) == "muon" and ".layers." in name and weight.dim() == 2:
            assert torch.equal(weight, expected[name]), name
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, MUON])
def test_a_gradient_that_is_not_finite_changes_nothing_in_either_home(options: dict[str, Any]) -> None:
    (found,) = run_ranks(updated, 1, small_config(optimizer=options), 2, True)
    updates, weights, before = found
    assert all(update.is_skipped and not math.isfinite(update.grad_norm) for update in updates)
    assert math.isfinite(updates[0].stage_grad_norm), "only the shared home's are spoiled"
    assert weights.keys() == before.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]), name
