"""What must hold of the models: tables that are tied, labels that mean what losses take them for, samples apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metro_megatron.config.schema import Config, ModelConfig
from metro_megatron.corruption.trained import TrainedModel
from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.data.views import View
from metro_megatron.health.corruption import next_words, other_answers, other_words
from metro_megatron.health.subject import Subject
from metro_megatron.model.early_exit import Exit
from metro_megatron.model.encoder import TIED, AuxiliaryModel, Encoder, Judge, Reading, TiedParameters
from metro_megatron.model.heads import Decoding
from metro_megatron.model.position import Positions
from metro_megatron.objective.mlm import MaskedLanguageModel
from metro_megatron.objective.rtd import ReplacedTokenDetection
from metro_megatron.objective.vocabulary import LanguageModel

SURE = 30.0
"""Logit of an answer that is known: its loss is below 1e-12."""


@torch.no_grad()
def problems(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch]) -> Iterator[str]:
    """Of micro batches on the device, while the modules train. Collective calls, to be exhausted."""
    yield from _ties(subject)
    yield from _positions(subject)
    views = subject.step.exchange(micro_batches, subject.step.propose(micro_batches, batch, subject.new_sums()))
    yield from _labels(subject, views[0])
    yield from _readings(subject, batch, views)


def _ties(subject: Subject) -> Iterator[str]:
    tied = subject.pair.shared[TIED]
    assert isinstance(tied, TiedParameters)
    word = tied.word.weight
    encoders: list[Encoder] = list(subject.pair.main)
    if "word" in subject.config.model.shared_parts:
        encoders += [one for one in subject.pair.shared.values() if isinstance(one, AuxiliaryModel)]
    if any(encoder.word is not word for encoder in encoders):
        yield "the token table is not tied: a model reads or decodes with another one than both share"


def _positions(subject: Subject) -> Iterator[str]:
    for _, module in subject.pair.modules():
        for one in module.modules():
            if not isinstance(one, Positions) or one.scheme.buckets is None or not one.scheme.resets_cls:
                continue
            rows = one.row_of.argmax(1)
            of_cls, others = set(rows[-2:].tolist()), set(rows[:-2].tolist())
            bias = one.bias()
            if bias is None or bias.cls is None or of_cls & others or len(of_cls) < 2:
                yield "[CLS] has no buckets of its own, though model.reset_cls is set"


def _labels(subject: Subject, view: View) -> Iterator[str]:
    """Answers that are known to be right must have no loss: labels and targets are those of the text."""
    micro_batch = view.micro_batch
    for term in subject.all_terms:
        if isinstance(term, ReplacedTokenDetection):
            logits = torch.where(view.tokens != micro_batch.tokens, -SURE, SURE).t()
            loss, sums = term.loss(_reading(term.name, logits), view, subject.layout)
            found, kept = sums["replaced_found"], sums["original_kept"]
            replaced = ((view.tokens != micro_batch.tokens) & micro_batch.is_real).sum()
            if float(loss) > 1e-6 or found != replaced or kept != micro_batch.is_real.sum() - replaced:
                yield "replaced token detection: a right answer, below 0 for replaced, is counted as a wrong one"
        elif isinstance(term, LanguageModel) and (term.name != "clm" or subject.config.objective.clm == "simplified"):
            decoding = _knowing(subject, micro_batch)
            if isinstance(term, MaskedLanguageModel):
                known = term.statistics(decoding, micro_batch, subject.layout.tensor)
                loss, correct = known.loss.sum(), (known.predicted == micro_batch.masked_targets).sum()
            else:
                loss, sums = term.loss(_reading(term.name, decoding), view, subject.layout)
                correct = sums[f"{term.name}_correct"]
            if float(loss) > 1e-3 * max(len(decoding.rows), 1) or correct != len(decoding.rows):
                yield f"{term.name}: the original at a mask is not what its loss wants"


def _reading(name: str, head: object) -> Reading:
    return Reading(torch.empty(0), {name: head}, is_last=True)


def _knowing(subject: Subject, micro_batch: MicroBatch) -> Decoding:
    """The decoding of a model that knows the originals: its table has the bits of ids, and rows those of originals."""
    group, model = subject.layout.tensor, subject.config.model
    size = model.padded_vocab_size // group.size()
    bits = math.ceil(math.log2(model.padded_vocab_size))
    dtype = next(subject.pair.main[0].parameters()).dtype

    def code(ids: Tensor) -> Tensor:
        return 2.0 * (ids[:, None] >> torch.arange(bits, device=ids.device) & 1) - 1

    table = code(torch.arange(size, device=subject.layout.device) + group.rank() * size)
    originals = micro_batch.tokens.t().reshape(-1)[micro_batch.masked_index]
    bias = torch.zeros(size, device=subject.layout.device)
    # Another id differs in one bit at least, which is 2 SURE.
    return Decoding(SURE * code(originals).to(dtype), table.to(dtype), bias.to(dtype))


def _readings(subject: Subject, batch: StepBatch, views: list[View]) -> Iterator[str]:
    """What main makes of the views: the same again, other with other dropout, and of each sample by itself."""
    config = subject.config
    first, heads = _read(subject, batch, views)
    again, heads_again = _read(subject, batch, views)
    if not _same(config, first, again):
        yield "main reads the same text with the same dropout in another way"
    # In however small a way a thing gets in: to the bit, where the same text twice is the same to the bit.
    same = _equal if _equal(config, first + _tensors(heads), again + _tensors(heads_again)) else _same
    hidden, blind = _read(subject, batch, views, partial(_without_answers, config.model))
    if not same(config, first + _tensors(heads), hidden + _tensors(blind)):
        yield "main sees the originals, or what else it has to find out, beside the text that it reads"
    hidden, blind = _read(subject, batch, views, _with_other_masks)
    of_all = [head for head in heads if isinstance(head, Tensor)]  # others look at masks alone
    if not same(config, first + of_all, hidden + [head for head in blind if isinstance(head, Tensor)]):
        yield "main sees where the masks are beside the text that it reads"
    following = subject.step.on_device(replace(batch, step=batch.step + 1))
    reseeded = [
        replace(view, micro_batch=replace(view.micro_batch, dropout_seed=one.dropout_seed))
        for view, one in zip(views, following, strict=True)
    ]
    second, _ = _read(subject, batch, reseeded)
    drops = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
    if first and drops and same(config, first, second):
        yield (
            "main does not drop, or the same in the next step, though model.hidden_dropout or attention_dropout is "
            "set: it is not told to train, or its dropout has a constant seed"
        )
    if first and not drops and not _same(config, first, second):
        yield "main drops, though model.hidden_dropout and attention_dropout are 0"
    number = next((index for index, view in enumerate(views) if view.micro_batch.num_samples > 1), None)
    # All pipeline ranks have the same micro batches; others go on with their own.
    if number is None:
        return
    own = _longest_sample(views[number].micro_batch)
    others = views[number].micro_batch.is_real & ~own
    changed = list(views)
    changed[number] = replace(views[number], tokens=other_words(config.model, views[number].tokens, own))
    has_words = not torch.equal(changed[number].tokens, views[number].tokens)  # of plain masked text all may be masks
    found, _ = _read(subject, batch, changed)
    if first and not _same(config, [_at(first[number], others)], [_at(found[number], others)]):
        yield "main: a sample's tokens change what is made of another sample in the row"
    if first and has_words and same(config, [_at(first[number], own)], [_at(found[number], own)]):
        yield "main: a sample's states do not depend on its tokens"
    if isinstance(subject.corruptor, TrainedModel):
        micro_batch = views[number].micro_batch
        tokens = other_words(config.model, micro_batch.masked_tokens, own)
        before, after = (
            subject.corruptor.read(one, drops=True).rows
            for one in (micro_batch, replace(micro_batch, masked_tokens=tokens))
        )
        is_other = others.t().reshape(-1)[micro_batch.masked_index]
        if not _same(config, [before[is_other]], [after[is_other]]):
            yield "auxiliary: a sample's tokens change what is made of another sample in the row"


def _read(
    subject: Subject, batch: StepBatch, views: list[View], change: Callable[[View], View] = lambda view: view
) -> tuple[list[Tensor], list[Any]]:
    """Main's last states [S, B, H] of every view, on the last stage, and what all heads of this stage say.

    change: of what chunks get; input ids, and a second view made of the originals, are those of the view itself.
    """
    found: list[Tensor] = []
    heads: list[Any] = []

    def before(module: object, args: tuple[View, Judge | None]) -> tuple[View, Judge | None]:
        view, judge = args
        if judge is None:
            return change(view), None

        def of_layer(name: str, reading: Reading) -> Tensor:
            heads.extend(reading.heads.values())
            return judge(name, reading)

        return change(view), of_layer

    def behind(module: object, args: object, output: Reading) -> None:
        heads.extend(output.heads.values())
        if output.is_last:
            found.append(output.hidden.clone())

    hooks = [chunk.register_forward_pre_hook(before) for chunk in subject.pair.main]
    hooks += [chunk.register_forward_hook(behind) for chunk in subject.pair.main]
    try:
        subject.step.read(views, batch, subject.new_sums())
    finally:
        for hook in hooks:
            hook.remove()
    return found, heads


def _without_answers(model_config: ModelConfig, view: View) -> View:
    """The same input ids, of other originals, noise and distractors."""
    micro_batch, distractors = other_answers(model_config, view.micro_batch), view.distractors
    masked_tokens = other_words(model_config, micro_batch.masked_tokens, micro_batch.is_real)
    distractors = None if distractors is None else next_words(model_config, distractors)
    return replace(view, micro_batch=replace(micro_batch, masked_tokens=masked_tokens), distractors=distractors)


def _with_other_masks(view: View) -> View:
    """The same input ids, with all masks one place further."""
    micro_batch = view.micro_batch
    moved = (micro_batch.masked_index + 1) % micro_batch.tokens.numel()
    return replace(view, micro_batch=replace(micro_batch, masked_index=moved))


def _tensors(heads: list[Any]) -> list[Tensor]:
    """All that heads say."""
    return tree_leaves([vars(head) if isinstance(head, Exit) else head for head in heads if head is not None])


def _equal(config: Config, one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _same(config: Config, one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal but for rounding: products of other rows may be added in another order."""
    tolerance = 1e-4 if config.train.precision == "fp32" else 2e-2
    return all(
        torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance) for a, b in zip(one, other, strict=True)
    )


def _at(hidden: Tensor, where: Tensor) -> Tensor:
    """Of hidden states [S, B, H], or twice as many of two views side by side, those of tokens [B, S]."""
    where = where.t()
    return hidden[: where.size(0), : where.size(1)][where]


def _longest_sample(micro_batch: MicroBatch) -> Tensor:
    """bool [B, S] where the first of the longest samples lies."""
    lengths = micro_batch.sample_lengths.long()
    number = int(lengths.argmax())
    if micro_batch.is_packed:
        column = torch.arange(micro_batch.tokens.size(1), device=lengths.device)
        begin = lengths[:number].sum()
        return ((column >= begin) & (column < begin + lengths[number]))[None]
    is_row = torch.arange(len(lengths), device=lengths.device) == number
    return is_row[:, None] & micro_batch.is_real
