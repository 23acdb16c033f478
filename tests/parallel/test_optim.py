"""One update of both homes against torch's AdamW, and what a gradient that is not finite does."""

from __future__ import annotations

import math

import pytest
import torch

from metro_megatron.config.schema import Config
from metro_megatron.model.init import global_parameters
from metro_megatron.parallel.optim import Update
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start

SPOILED = "aux.head.dense.weight"


def updated(
    config: Config, steps: int, spoil: bool
) -> tuple[list[Update], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Updates from random gradients; weights after them; and those of torch's AdamW, in one order."""
    trainer = start(config)
    named = {
        name: parameter
        for prefix, module in trainer.pair.modules()
        for name, parameter in global_parameters(module, prefix)
    }
    options = config.optimizer
    copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    decayed = [one for one in copies.values() if one.dim() > 1 or options.decay_all]
    others = [one for one in copies.values() if one.dim() <= 1 and not options.decay_all]
    adam = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
    )
    generator, updates = torch.Generator().manual_seed(1), []
    for step in range(steps):
        trainer.homes.begin_step()
        for name, parameter in named.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]
            copies[name].grad = gradient
        if spoil:
            named[SPOILED].main_grad[0, 0] = math.nan  # type: ignore[attr-defined]
        trainer.homes.end_corruption_phase()
        trainer.homes.end_main_phase()
        updates.append(trainer.optimizer.step(step).read())
        if not spoil:
            torch.nn.utils.clip_grad_norm_(copies.values(), options.clip_grad or math.inf)
            for group in adam.param_groups:
                group["lr"] = updates[-1].learning_rate
            adam.step()
    trainer.homes.fetch_parameters()
    result = updates, {name: p.detach().clone() for name, p in named.items()}, [c.detach() for c in copies.values()]
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
    for (name, weight), wanted in zip(weights.items(), expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing_in_either_home() -> None:
    (found,) = run_ranks(updated, 1, small_config(), 2, True)
    updates, weights, before = found
    assert all(update.is_skipped and not math.isfinite(update.grad_norm) for update in updates)
    assert math.isfinite(updates[0].stage_grad_norm), "only the shared home's are spoiled"
    for (name, weight), wanted in zip(weights.items(), before, strict=True):
        assert torch.equal(weight, wanted), name
