"""Before the first step: what leaves no trace in curves is looked at, through the run's own parts.

Nothing that training reads is changed: weights are put back bit for bit, and gradients are forgotten by the next step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from metro_megatron.data.batch import StepBatch
from metro_megatron.errors import UserError
from metro_megatron.health import batches, corruption, gradients, models, parts, reach
from metro_megatron.health.subject import Subject
from metro_megatron.model.init import starting_parts
from metro_megatron.objective.term import weighing


def self_check(subject: Subject, batch: StepBatch, following: StepBatch | None) -> str:
    """Look at everything with the batches of the next two steps, or of the last one; returns a line that says so.

    Something that only the run's own weights and factors of losses show is no fault of the program: layers die, and
    what is tiny is rounded away. Raises UserError, on every rank, naming all that is wrong. A collective call.
    """
    started = time.monotonic()
    subject.homes.fetch_parameters()
    part = _part(subject, batch)
    wrong = odd = _all_problems(subject, batch, following, part)
    if wrong and not subject.layout.any_rank(subject.homes.misses_backward):  # which no weights do
        with _usual_weights(subject), weighing(subject.all_terms, lambda weight: float(weight > 0)):
            wrong = _all_problems(subject, batch, following, part)
    if wrong:
        remedy = "what runs is not what the options say; undo the change to the program, or set train.self_check false"
        raise UserError([*(f"self-check: {problem}" for problem in wrong), f"self-check: {remedy}"])
    why = gradients.bent(subject.config, batch)
    but = f"; derivatives were not looked at, as {why}" if why else ""
    if reach.hides_parts(subject.config, part):
        but += "; not all that gradients may miss was looked for, as few masks get through"
    if odd:
        but += f"; of these weights, and no fault of the program: {'; '.join(odd)}"
    seconds = time.monotonic() - started
    return f"self-check: batches, replacements, models and gradients are in order{but} ({seconds:.1f} s)"


def _all_problems(subject: Subject, batch: StepBatch, following: StepBatch | None, part: StepBatch) -> list[str]:
    """Of all ranks; of parts only where nothing is wrong in the whole. A collective call."""
    found = _of_all_ranks(subject, _problems(subject, batch, following, part))
    if not found and not reach.leaving(subject.config, batch):
        found = _of_all_ranks(subject, parts.problems(subject, part, subject.step.on_device(part)))
    return found


def _of_all_ranks(subject: Subject, problems: Iterator[str]) -> list[str]:
    """A collective call."""
    everyone: list[list[str]] = [[]] * subject.layout.world.size()
    dist.all_gather_object(everyone, list(problems), group=subject.layout.world)
    return list(dict.fromkeys(problem for one in everyone for problem in one))


@contextmanager
def _usual_weights(subject: Subject) -> Iterator[None]:
    """All weights at random, such that states and logits are about 1; masters, which the look does not read, stay."""
    model, seed, group = subject.config.model, subject.config.train.seed, subject.layout.tensor
    model = replace(model, init_method_std=model.hidden_size**-0.5, position_init="normal", relative_bias_init="normal")
    own = []
    with torch.no_grad():
        for prefix, module in subject.pair.modules():
            for parameter, part in starting_parts(module, prefix, model, seed, group):
                own.append((parameter, parameter.clone()))
                parameter.copy_(part)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in own:
                parameter.copy_(weight)


def _problems(subject: Subject, batch: StepBatch, following: StepBatch | None, part: StepBatch) -> Iterator[str]:
    """part: of the batch."""
    yield from batches.problems(subject.config, subject.layout, batch, following)
    micro_batches = subject.step.on_device(part)
    yield from corruption.problems(subject, part, micro_batches)
    # FP8 scales a tensor by its largest value, so that each sample moves the others' states a little.
    with subject.configured(fp8=None):
        yield from models.problems(subject, part, micro_batches)
    yield from gradients.problems(subject, part)


def _part(subject: Subject, batch: StepBatch) -> StepBatch:
    """The first micro batches alone, one for each pipeline stage, with counts of their own. A collective call."""
    own = batch.micro_batches[: subject.layout.pipeline.size()]
    counts = [(one.masked_index.numel(), int(one.is_real.sum()), one.num_samples) for one in own]
    totals = torch.tensor([sum(column) for column in zip(*counts, strict=True)], device=subject.layout.device)
    dist.all_reduce(totals, group=subject.layout.data)
    masked, tokens, samples = totals.tolist()
    return replace(batch, micro_batches=own, num_masked=masked, num_tokens=tokens, num_samples=samples)
