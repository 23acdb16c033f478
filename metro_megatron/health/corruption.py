"""What must hold of replacements: drawn from what the corruptor says, by the noise's keys, of masked text alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.corruption.corruptor import sampling_of
from metro_megatron.corruption.trained import TrainedModel
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.health.subject import Subject

ROWS = 256
"""Masked tokens whose logits are made."""
SIGMAS = 6.0
SURPRISE = 14.0
"""Nats: equal samples are chance less than once in a million."""


@torch.no_grad()
def problems(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch]) -> Iterator[str]:
    """Of micro batches on the device, while the modules train. Collective calls, to be exhausted."""
    source = subject.config.corruption.source
    micro_batch = micro_batches[0]
    first, second = (_sampled(subject, micro_batch, batch) for _ in range(2))
    if not torch.equal(first, second):
        yield "replacements change when they are drawn again with the same noise"
    if source not in ("none", "cached"):
        other = _sampled(subject, replace(micro_batch, noise_keys=~micro_batch.noise_keys), batch)
        if torch.equal(first, other) and _surprise(subject, micro_batch, batch, first) > SURPRISE:
            yield "replacements do not depend on the noise: the likeliest word, or one fixed noise"
        shown = replace(micro_batch, tokens=other_words(subject.config.model, micro_batch.tokens, micro_batch.is_real))
        if not subject.config.corruption.disallow_correct and not torch.equal(first, _sampled(subject, shown, batch)):
            yield "replacements depend on the originals: what draws them reads these"
        if not _is_word(subject, first).all():
            yield "replacements are special tokens, or beyond the vocabulary"
    if isinstance(subject.corruptor, TrainedModel):
        yield from _trained(subject, subject.corruptor, micro_batch, batch, first)
    yield from _views(subject, batch, micro_batches)


def _surprise(subject: Subject, micro_batch: MicroBatch, batch: StepBatch, sampled: Tensor) -> float:
    """-log of the chance that the same is drawn once more, in nats: at the first masks, by what a model says, else by
    how often each word was drawn."""
    if isinstance(subject.corruptor, TrainedModel):
        log_p = _log_probabilities(subject, subject.corruptor, micro_batch, batch)
        return -float(log_p.gather(1, sampled[:ROWS, None]).sum())
    targets = micro_batch.masked_targets
    # Where the original is not drawn, of two words the other one is: by whether it is the most frequent one.
    kind = (targets == targets.mode().values).long() if subject.config.corruption.disallow_correct else 0 * targets
    return _nats(torch.stack([kind, sampled], 1)) - _nats(kind)


def _nats(rows: Tensor) -> float:
    """Of all of them, by how often each was seen."""
    counts = rows.unique(dim=0, return_counts=True)[1].double()
    return float((counts * (len(rows) / counts).log()).sum())


def _is_word(subject: Subject, ids: Tensor) -> Tensor:
    """bool of the shape of ids."""
    model = subject.config.model
    return (ids < model.vocab_size) & ~torch.isin(ids, torch.tensor(model.special_ids.all, device=ids.device))


def next_words(model_config: ModelConfig, ids: Tensor) -> Tensor:
    """The word behind each, as another one."""
    special_ids = model_config.special_ids
    return special_ids.word((special_ids.number(ids) + 1) % special_ids.num_words(model_config.vocab_size))


def other_words(model_config: ModelConfig, tokens: Tensor, where: Tensor) -> Tensor:
    """tokens [B, S] with the word behind each instead of it, where it is one and bool [B, S] says so."""
    reserved = torch.tensor(model_config.special_ids.reserved, device=tokens.device)
    return torch.where(where & ~torch.isin(tokens, reserved), next_words(model_config, tokens), tokens)


def other_answers(model_config: ModelConfig, micro_batch: MicroBatch) -> MicroBatch:
    """With other originals, noise and cached replacements, and the masked text as it was: what no model may see."""
    replacements = micro_batch.replacements
    return replace(
        micro_batch,
        tokens=other_words(model_config, micro_batch.tokens, micro_batch.is_real),
        noise_keys=~micro_batch.noise_keys,
        replacements=None if replacements is None else next_words(model_config, replacements),
    )


def _sampled(subject: Subject, micro_batch: MicroBatch, batch: StepBatch) -> Tensor:
    return subject.corruptor.propose(micro_batch, batch, subject.optimizer.scale_loss).sampled


def _trained(
    subject: Subject, model: TrainedModel, micro_batch: MicroBatch, batch: StepBatch, sampled: Tensor
) -> Iterator[str]:
    decoding = model.read(micro_batch, drops=True)
    rows = decoding.rows
    blind = model.read(other_answers(subject.config.model, micro_batch), drops=True)
    if not all(map(torch.equal, decoding, blind)):
        yield "the auxiliary reads the originals that it has to name"
    (other,) = subject.step.on_device(replace(batch, step=batch.step + 1, micro_batches=batch.micro_batches[:1]))
    is_same = torch.equal(rows, model.read(other, drops=True).rows)
    options = subject.config.model
    drops = options.auxiliary_dropout != "zero" and (options.hidden_dropout > 0 or options.attention_dropout > 0)
    if drops and is_same and len(rows):
        yield "the auxiliary does not drop, or the same in the next step, though model.auxiliary_dropout is not zero"
    if not drops and not is_same:
        yield "the auxiliary drops, though model.auxiliary_dropout is zero, or no dropout set"
    deviation = _deviation(subject, model, micro_batch, batch, sampled)
    if abs(deviation) > SIGMAS:
        yield (
            "replacements are not drawn from what the auxiliary says: their log-probability is "
            f"{deviation:+.1f} standard deviations from that of draws"
        )


def _deviation(
    subject: Subject, model: TrainedModel, micro_batch: MicroBatch, batch: StepBatch, sampled: Tensor
) -> float:
    """Of the sum of log p(sample) over some masks, in standard deviations of what draws from p give."""
    log_p = _log_probabilities(subject, model, micro_batch, batch)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    spread = (p * log_p.square()).sum(-1) - mean.square()
    drawn = log_p.gather(1, sampled[:ROWS, None])[:, 0].clamp(min=-1e3)
    return float((drawn - mean).sum() / spread.sum().clamp(min=1e-6).sqrt())


def _log_probabilities(subject: Subject, model: TrainedModel, micro_batch: MicroBatch, batch: StepBatch) -> Tensor:
    """[min(M, ROWS), V] of draws at the first masks, in FP64. A collective call."""
    decoding = model.read(micro_batch, drops=True)
    group = subject.layout.tensor
    own = decoding._replace(rows=decoding.rows[:ROWS]).logits().float().contiguous()
    parts = own.new_empty(group.size() * len(own), own.size(1))
    dist.all_gather_into_tensor(parts, own, group=group)
    logits = parts.view(group.size(), *own.shape).transpose(0, 1).flatten(1).double()
    sampling = sampling_of(subject.config, micro_batch, batch)
    is_word = _is_word(subject, torch.arange(logits.size(1), device=logits.device))
    logits = logits.masked_fill(~is_word, -1e30) / sampling.temperature
    if subject.config.corruption.disallow_correct:
        logits.scatter_(1, micro_batch.masked_targets[:ROWS, None], -1e30)
    return logits.log_softmax(-1)


def _views(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch]) -> Iterator[str]:
    proposals = subject.step.propose(micro_batches, batch, subject.new_sums())
    views = subject.step.exchange(micro_batches, proposals)
    pipeline = subject.layout.pipeline
    digests = torch.stack([(view.tokens * _weights(view.tokens)).sum() for view in views])
    everyone = digests.new_empty(pipeline.size() * len(digests))
    dist.all_gather_into_tensor(everyone, digests, group=pipeline)
    if (everyone.view(pipeline.size(), -1) != digests).any():
        yield "pipeline stages do not read the same replacements"
    for view in views:
        micro_batch = view.micro_batch
        if (view.tokens != micro_batch.tokens)[~micro_batch.is_masked].any():
            yield "tokens are replaced that were not masked"
        drawn = _sampled(subject, micro_batch, batch)
        if not torch.equal(view.tokens.t().reshape(-1)[micro_batch.masked_index], drawn):
            yield "main does not read what was drawn at the masks"


def _weights(tokens: Tensor) -> Tensor:
    """Odd numbers, so that the order of tokens counts in a sum of products."""
    return 2 * torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape) + 1
