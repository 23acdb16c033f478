"""Updates of both homes against torch's AdamW and Muon, and what a gradient that is not finite does."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch

from metro_megatron.config.schema import Config, OptimizerConfig
from metro_megatron.model.init import global_parameters, split_dimension
from metro_megatron.parallel.layout import Layout
from metro_megatron.parallel.optim import Update
from tests.distributed import run_ranks
from tests.parity.small_run import small_config, start, use_small_buckets, whole_weights

SPOILED = "aux.head.dense.weight"
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
Weights = dict[str, torch.Tensor]


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
            muon.append({"params": [one], "lr": of_muon[is_auxiliary], "is_auxiliary": is_auxiliary})
        else:
            decay = options.weight_decay if one.dim() > 1 or options.decay_all else 0.0
            group = {"params": [one], "weight_decay": decay, "betas": betas[is_auxiliary], "lr": rates[is_auxiliary]}
            adam.append({**group, "is_auxiliary": is_auxiliary})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, eps=options.adam_eps)]
    if muon:
        momentum, decay = options.muon_momentum, options.weight_decay
        optimizers.append(torch.optim.Muon(muon, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def pieces(weights: Weights) -> Weights:
    """The same with q, k and v [H, H] apart, of matrices [4 3 K, H] that hold them head by head."""
    found = {}
    for name, whole in weights.items():
        if name.endswith("linear_qkv.weight"):
            kinds = whole.view(4, 3, -1, whole.size(1)).unbind(1)
            found.update({f"{name}.{kind}": one.flatten(0, 1) for kind, one in zip("qkv", kinds, strict=True)})
        else:
            found[name] = whole.clone()
    return found


def updated(config: Config, steps: int, spoiled: int) -> tuple[list[Update], Weights, Weights]:
    """On every rank: updates from random gradients, of which the first `spoiled` steps' have a NaN.

    Also whole weights after them, q, k and v apart, and those of torch's optimizers, which see the others alone.
    """
    use_small_buckets()
    trainer = start(config)
    layout, options = trainer.layout, config.optimizer
    start_weights = whole_weights(trainer)
    copies = {part: torch.nn.Parameter(one.float()) for part, one in pieces(start_weights).items()}
    optimizers = reference(options, copies)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks, updates = [group["lr"] for group in groups], []
    for step in range(steps):
        trainer.homes.begin_step()
        gradients = {name: gradient_of(name, whole, step) for name, whole in start_weights.items()}
        for prefix, module in trainer.pair.modules():
            replicas = layout.data if prefix == "main." else layout.replica
            for name, parameter in global_parameters(module, prefix):
                # The replicas' sum is the whole, exactly.
                part = own_part(gradients[name], parameter, layout) / replicas.size()
                part = trainer.optimizer.scale_loss(part)
                parameter.main_grad.copy_(part)  # type: ignore[attr-defined]
                if name == SPOILED and step < spoiled:
                    parameter.main_grad[0, 0] = math.nan  # type: ignore[attr-defined]
        trainer.homes.end_corruption_phase()
        trainer.homes.end_main_phase()
        updates.append(trainer.optimizer.step(step).read())
        if step >= spoiled:
            for part, gradient in pieces(gradients).items():
                copies[part].grad = gradient
            torch.nn.utils.clip_grad_norm_(copies.values(), options.clip_grad or math.inf)
            for group, peak in zip(groups, peaks, strict=True):
                is_own = group["is_auxiliary"] and options.auxiliary_lr_schedule
                group["lr"] = peak * (SHARES[step] if is_own else updates[-1].learning_rate / options.lr)
            for optimizer in optimizers:
                optimizer.step()
    trainer.homes.fetch_parameters()
    result = updates, pieces(whole_weights(trainer)), {name: one.detach() for name, one in copies.items()}
    trainer.close()
    return result


def gradient_of(name: str, whole: torch.Tensor, step: int) -> torch.Tensor:
    """Of numbers that every format holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(whole.shape, generator=generator).bfloat16().float()


def own_part(whole: torch.Tensor, parameter: torch.nn.Parameter, layout: Layout) -> torch.Tensor:
    """What this tensor-parallel rank has of a parameter."""
    split = split_dimension(parameter)
    return whole if split is None else whole.chunk(layout.tensor.size(), split)[layout.tensor.rank()]


@pytest.mark.parametrize(("clip_grad", "decay_all"), [(1.0, False), (0.0, True)])
def test_updates_are_those_of_adamw(clip_grad: float, decay_all: bool) -> None:
    """Rates of the warm-up, one norm over both homes, decay of matrices only or of all."""
    config = small_config(optimizer={"clip_grad": clip_grad, "decay_all": decay_all, "weight_decay": 0.1})
    (found,) = run_ranks(updated, 1, config, 3, 0)
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
SCHEDULED = {"auxiliary_lr_schedule": "1 -> 0.25 at step 1 -> 0.75 at step 3"}
SHARES = [0.25, 0.5, 0.75]
"""What it says of the first steps, each when it is done."""


BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}


@pytest.mark.parametrize(
    ("world_size", "optimizer", "train", "parallel"),
    [
        (1, OWN, {}, {}),
        (1, {"auxiliary_adam_beta2": 0.9}, {}, {}),
        (1, SCHEDULED, {}, {}),
        (1, {**MUON, **OWN, **SCHEDULED}, {}, {}),
        (1, {**MUON, **OWN, "muon_lr": 2e-2, "muon_momentum": 0.9}, {}, {}),
        (1, {"auxiliary_matrices": "muon", "auxiliary_muon_lr": 1e-2}, FP16, {}),
        (2, {**MUON, **OWN}, BF16, {}),
        (2, MUON, {}, {TP: 2}),
        pytest.param(2, MUON, BF16, {"grad_reduce_in_fp32": False}, marks=pytest.mark.long),
        pytest.param(2, {**MUON, **OWN}, {}, {PP: 2, "overlap": False}, marks=pytest.mark.long),
        pytest.param(4, MUON, {}, {TP: 2, PP: 2, "virtual_pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
)
def test_each_of_the_pair_has_its_own_optimizer(
    world_size: int, optimizer: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any]
) -> None:
    """Rates, betas and Muon by model, the shared table at main's, after a step that was skipped.

    From equal gradients, matrices are torch.optim.Muon's to the bit in every layout and format.
    """
    options = {"clip_grad": 0.0, "weight_decay": 0.1, **optimizer}
    config = small_config(optimizer=options, train=train, parallel=parallel)
    updates, weights, expected = run_ranks(updated, world_size, config, 3, 1)[0]
    assert [update.is_skipped for update in updates] == [True, False, False]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        wanted = expected[name].to(weight.dtype)
        model = "auxiliary_matrices" if name.startswith("aux.") else "matrices"
        if options.get(model) == "muon" and ".layers." in name and weight.dim() == 2:
            assert torch.equal(weight, wanted), name
        # An Adam of other kernels may round to the neighbour.
        near = {"rtol": 1e-5, "atol": 1e-6} if weight.dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(weight, wanted, **near, msg=name)


@pytest.mark.parametrize("options", [{}, MUON])
def test_a_gradient_that_is_not_finite_changes_nothing_in_either_home(options: dict[str, Any]) -> None:
    (found,) = run_ranks(updated, 1, small_config(optimizer=options), 2, 2)
    updates, weights, before = found
    assert all(update.is_skipped and not math.isfinite(update.grad_norm) for update in updates)
    assert math.isfinite(updates[0].stage_grad_norm), "only the shared home's are spoiled"
    assert weights.keys() == before.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]), name
