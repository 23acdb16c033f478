"""What must hold of gradients: they reach all, losses' add up, and they are the derivative of the logged loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.health import reach
from metro_megatron.health.shards import Shard, shards
from metro_megatron.health.subject import Subject
from metro_megatron.objective.figures import weighted
from metro_megatron.objective.term import weighing

STEP = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
"""Share of the loss by which a step along the gradient shall change it: far above rounding, nearly linear."""
LARGEST = 0.05
"""Norm of that step at most, as a share of the weights' or of what they start from."""
SHARES = (1.0, 1 / 8, 1 / 64)
"""Of that step, until one agrees: a wrong gradient stays wrong on a shorter one, a bent loss straightens."""
BLUR = {"fp32": 2**-22, "bf16": 2**-6, "fp16": 2**-9}
"""What rounding may add to one token's loss, as a share of it: twice the format's step. Of many tokens it averages."""
TOLERANCE = {"fp32": 0.15, "bf16": 0.35, "fp16": 0.35}
"""Gradients that miss a rank, a micro batch or a phase are off by a half or more."""

GROUPS = (
    ("token table", lambda name: name == "tied.word.weight"),
    ("position tables", lambda name: "table" in name or "position" in name),
    ("auxiliary", lambda name: name.startswith("aux.")),
    ("main", lambda name: True),
)
"""Parameters whose gradients are compared together, each in the first that takes it."""


def problems(subject: Subject, batch: StepBatch) -> Iterator[str]:
    """Of a step's batch on the host; the gradients stay behind, and the next step forgets them. Collective calls."""
    own = list(shards(subject.pair, subject.optimizer, subject.layout))
    found = list(reach.frozen(subject, own))
    views = [] if found else _gradients(subject, batch)
    if not found and batch.num_masked:
        found = list(reach.unreached(subject, batch, own, views))
    if found:
        yield from found
        return  # what follows would say the same once more, of each loss
    whole = [one.gradient.clone() for one in own]
    for term in subject.all_terms:
        if not term.weight_at(batch.step):
            continue
        with weighing([one for one in subject.all_terms if one is not term], lambda weight: 0.0):
            views = _gradients(subject, batch)
        if own:  # else a tensor list without tensors
            torch._foreach_sub_(whole, [one.gradient for one in own])
        if batch.num_masked and term in subject.terms and term.layer is None:
            found += reach.unreached(subject, batch, own, views, term)
    views = _gradients(subject, batch)
    groups = list(_groups(own))
    for group, numbers in groups:
        found += _sum(subject, [own[number] for number in numbers], [whole[number] for number in numbers], group)
    del whole
    if found:
        yield from found
        return
    if bent(subject.config, batch):
        return
    scale = 1.0 if subject.optimizer.loss_scale is None else float(subject.optimizer.loss_scale.scale)
    micro_batches = subject.step.on_device(batch)
    for group, numbers in groups:
        yield from _derivative(subject, batch, micro_batches, views, [own[number] for number in numbers], group, scale)


def bent(config: Config, batch: StepBatch) -> str:
    """Why gradients are not, and need not be, the derivative of the loss; "": they are."""
    if reach.leaving(config, batch):
        return "tokens leave early"
    if "clm" in config.objective.main and config.objective.clm != "simplified" and config.objective.clm_weight:
        return f"clm {config.objective.clm} reads what RTD says without teaching it"
    return ""


def _gradients(subject: Subject, batch: StepBatch) -> list[View]:
    views = subject.step.gradients(batch, subject.new_sums())
    # With the sums megatron-core forgets that parameters are there. Stages would gather them in forward passes, each
    # when it gets to a module, and wait for each other.
    subject.homes.fetch_parameters()
    return views


def _groups(own: Sequence[Shard]) -> Iterator[tuple[str, list[int]]]:
    """GROUPS, and the numbers of their shards."""
    group_of = [next(group for group, takes in GROUPS if takes(one.name)) for one in own]
    for group, _ in GROUPS:
        yield group, [number for number, its in enumerate(group_of) if its == group]


@torch.no_grad()
def _sum(subject: Subject, members: Sequence[Shard], rest: Sequence[torch.Tensor], group: str) -> Iterator[str]:
    """rest: the gradient of the whole loss, less those of its parts, one after the other."""
    off = _total(subject, members, [one.double().square().sum() for one in rest])
    size = _total(subject, members, [one.gradient.double().square().sum() for one in members])
    if off > TOLERANCE[subject.config.train.precision] ** 2 * size:
        yield (
            f"the gradient of the {group} is not the sum of its losses' gradients, one after the other: something is "
            "left from the step before, or losses change each other's"
        )


@torch.no_grad()
def _derivative(
    subject: Subject,
    batch: StepBatch,
    micro_batches: list[MicroBatch],
    views: list[View],
    members: Sequence[Shard],
    group: str,
    scale: float,
) -> Iterator[str]:
    """The loss a step up and a step down the gradient of these parameters."""
    config, precision = subject.config, subject.config.train.precision
    before = [one.weight.clone() for one in members]
    gradients = [one.gradient.double() / scale for one in members]
    square = _total(subject, members, [gradient.square().sum() for gradient in gradients])
    size = _total(subject, members, [weight.double().square().sum() for weight in before])
    count = _total(subject, members, [torch.full_like(square, weight.numel()) for weight in before])
    loss = _loss(subject, batch, micro_batches, views)
    if float(square) == 0:
        return
    most = LARGEST * torch.maximum(size.sqrt(), config.model.init_method_std * count.sqrt())
    whole = torch.minimum(STEP[precision] * loss / square, most / square.sqrt())
    blur = BLUR[precision] * loss / math.sqrt(max(batch.num_masked, 1))
    ratio = 1.0
    for share in SHARES:
        losses, predicted = [], []
        for sign in (1, -1):
            for one, start, gradient in zip(members, before, gradients, strict=True):
                one.weight.copy_(start + sign * share * whole * gradient)
            moved = [
                ((one.weight.double() - start.double()) * gradient).sum()
                for one, start, gradient in zip(members, before, gradients, strict=True)
            ]
            predicted.append(float(_total(subject, members, moved)))
            _share_parameters(subject)
            losses.append(_loss(subject, batch, micro_batches, views))
        expected, found = predicted[0] - predicted[1], losses[0] - losses[1]
        # A change, or a difference, that small is lost in rounding.
        is_seen = abs(expected) > share * STEP[precision] * loss / 20 and abs(found - expected) > blur
        ratio = found / expected if is_seen else 1.0
        if abs(ratio - 1) <= TOLERANCE[precision]:
            break
    for one, start in zip(members, before, strict=True):
        one.weight.copy_(start)
    _share_parameters(subject)
    if abs(ratio - 1) > TOLERANCE[precision]:
        yield (
            f"the gradient of the {group} is not the derivative of the loss: a step along it changes the loss by "
            f"{ratio:.2f} of what it says"
        )


def _total(subject: Subject, members: Sequence[Shard], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Over all ranks, in FP64; what tensor-parallel ranks hold alike counts once."""
    total = torch.zeros((), dtype=torch.float64, device=subject.layout.device)
    for one, part in zip(members, parts, strict=True):
        if one.counts:
            total += part
    dist.all_reduce(total, group=subject.layout.world)
    return total


def _share_parameters(subject: Subject) -> None:
    """Give every rank what the owners of shards have changed."""
    subject.homes.end_step()
    subject.homes.fetch_parameters()


def _loss(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch], views: list[View]) -> float:
    """The whole loss of the step with the replacements as they were drawn."""
    sums = subject.new_sums()
    subject.step.propose(micro_batches, batch, sums)
    subject.step.read(views, batch, sums)
    figures = sums.reduce()
    terms = subject.all_terms
    return float(weighted(terms, {term.name: figures[f"{term.name}_loss"] for term in terms}, batch.step))
