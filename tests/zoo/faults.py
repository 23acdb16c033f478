"""The zoo: faults that really happen, as patches of the trainer's parts. What detects them does not know them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from metro_megatron import mcore
from metro_megatron.checkpoint import save
from metro_megatron.config.position import PositionScheme
from metro_megatron.corruption import trained
from metro_megatron.data import masking
from metro_megatron.data.batch import MicroBatch, MicroBatchBuilder
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.masking import Masking
from metro_megatron.data.order import SampleOrder
from metro_megatron.data.views import View
from metro_megatron.model import sequences
from metro_megatron.model.attention import Attention, CoreAttention
from metro_megatron.model.encoder import AuxiliaryModel, Borrowed, Encoder, MainModel, TiedParameters
from metro_megatron.model.heads import MLMHead, TiedDecoder
from metro_megatron.model.position import Positions
from metro_megatron.objective import rtd, vocabulary
from metro_megatron.objective.clm import CorrectiveLanguageModel
from metro_megatron.objective.rtd import ReplacedTokenDetection
from metro_megatron.objective.vocabulary import LanguageModel
from metro_megatron.parallel import optim
from metro_megatron.randomness import Purpose
from metro_megatron.schedule import Schedule
from metro_megatron.train import step
from metro_megatron.train.build import Parts
from metro_megatron.train.corpus import Corpus
from metro_megatron.train.step import Step
from metro_megatron.train.trainer import Trainer
from tests.zoo.lives import Concerns, Fault

Patch = pytest.MonkeyPatch
LATE = 120
"""Step of what happens in the middle of a run."""


def instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Puts make(what it was) in place of a function or method."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def after_updates(change: Callable[[Trainer, int], None]) -> Callable[[Trainer, Patch], None]:
    """Changes what every update leaves, counted from 1."""

    def infect(trainer: Trainer, patch: Patch) -> None:
        update, taken = trainer.optimizer._update, iter(range(1, 10_000))

        def ours(*args: Any) -> None:
            update(*args)
            change(trainer, next(taken))

        patch.setattr(trainer.optimizer, "_update", ours)

    return infect


# --- data and masks


def positions_run_on(cells: Any) -> Any:
    def ours(self: Any, samples: Any, begins: Any, num_cells: int) -> Any:
        tokens, positions, is_real = cells(self, samples, begins, num_cells)
        positions[is_real] = torch.arange(int(is_real.sum())).numpy() % 48
        return tokens, positions, is_real

    return ours


def one_to_the_left(smallest: Any) -> Any:
    def ours(*args: Any) -> Any:
        row, column = smallest(*args)
        return row, column - 1

    return ours


def keys_of_positions(keys: Any) -> Any:
    def ours(self: Any, draws: Any, positions: Any) -> Any:
        return keys(self, replace(draws, epoch=0 * draws.epoch, sample=0 * draws.sample), positions)

    return ours


def round_and_round(order: Any) -> Any:
    return lambda self, positions: order(self, positions % 72)


def from_the_start(order: Any) -> Any:
    """As if nothing had been read in the 3 steps before."""
    return lambda self, positions: order(self, positions - 3 * 24)


def same_part(build: Any) -> Any:
    def ours(self: Any, *args: Any) -> PretrainingData:
        data = build(self, *args)
        data._of_rank = partial(data._of_rank, dp_rank=0)
        return data

    return ours


def doubled_counts(build: Any) -> Any:
    def ours(self: Any, *args: Any) -> Any:
        found = build(self, *args)
        return replace(found, num_tokens=2 * found.num_tokens)

    return ours


def each_twice(order: Any) -> Any:
    """Every step reads what the one before it has read, or the next one will."""
    return lambda self, positions: order(self, positions // 48 * 24 + positions % 24)


def threefold(counts: Any) -> Any:
    return lambda self, draws, lengths: np.minimum(3 * counts(self, draws, lengths), lengths)


def first_words(hashes: Any) -> Any:
    """Masks lie on the first words of every sample."""

    def ours(states: Any, lengths: Any) -> Any:
        found = hashes(states, lengths)
        return np.where(found == masking._PADDING, found, np.arange(found.shape[1], dtype=np.uint64))

    return ours


def all_shown(readings: Any) -> Any:
    return lambda self, draws, positions, tokens: tokens


def far_target(patch: Patch) -> None:
    """Every mask wants that of another document."""
    targets: Any = MicroBatch.masked_targets
    patch.setattr(MicroBatch, "masked_targets", property(lambda self: half_round(targets.fget(self))))


def half_round(some: Tensor) -> Tensor:
    return some.roll(len(some) // 2)


def far_corrections(statistics: Any) -> Any:
    def ours(self: Any, decoding: Any, micro_batch: MicroBatch, *args: Any) -> Any:
        if self.name == "clm":
            tokens = micro_batch.tokens.t().flatten().clone()
            tokens[micro_batch.masked_index] = half_round(tokens[micro_batch.masked_index])
            micro_batch = replace(micro_batch, tokens=tokens.view(*micro_batch.tokens.t().shape).t().contiguous())
        return statistics(self, decoding, micro_batch, *args)

    return ours


def target_behind(patch: Patch) -> None:
    """Every mask wants the word behind it."""

    def ours(self: MicroBatch) -> Tensor:
        return self.tokens.t().reshape(-1)[self.masked_index + self.tokens.size(0)]

    patch.setattr(MicroBatch, "masked_targets", property(ours))


def next_target(patch: Patch) -> None:
    """Every mask wants the original of another."""
    targets: Any = MicroBatch.masked_targets
    patch.setattr(MicroBatch, "masked_targets", property(lambda self: targets.fget(self).roll(1)))


# --- replacements


def sampling(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Statistics of a vocabulary whose sampling is changed."""

    def make(statistics: Any) -> Any:
        def ours(rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shard: Any, sampling: Any = None) -> Any:
            return statistics(rows, weight, bias, targets, shard, sampling and change(sampling))

        return ours

    return make


def likeliest(statistics: Any) -> Any:
    def ours(*args: Any) -> Any:
        found = statistics(*args)
        return found if found.sampled is None else found._replace(sampled=found.predicted)

    return ours


def reads_originals(forward: Any) -> Any:
    return lambda self, micro_batch: forward(self, replace(micro_batch, masked_tokens=micro_batch.tokens))


def with_dropout(build: Any) -> Any:
    return lambda config, device: build(replace(config, model=replace(config.model, auxiliary_dropout="train")), device)


def one_noise(statistics: Any) -> Any:
    return sampling(lambda one: one._replace(keys=torch.zeros_like(one.keys)))(statistics)


def cold(statistics: Any) -> Any:
    return sampling(lambda one: one._replace(temperature=0.3))(statistics)


def never_training(tell: Any) -> Any:
    def ours(self: Step, is_training: bool) -> None:
        tell(self, False)

    return ours


# --- losses and gradients


def swapped(loss: Any) -> Any:
    return lambda logits, is_original, is_real: loss(logits, ~is_original, is_real)


def at_masks_alone(loss: Any) -> Any:
    return lambda self, reading, view, layout: loss(self, reading, at_masks(view), layout)


def at_masks(view: View) -> View:
    micro_batch = view.micro_batch
    return replace(view, micro_batch=replace(micro_batch, is_real=micro_batch.is_real & micro_batch.is_masked))


def without_weight(patch: Patch) -> None:
    patch.setattr(ReplacedTokenDetection, "weight", Schedule(0.0))


def negative(weighted: Any) -> Any:
    return lambda *args: -weighted(*args)


def halved(weighted: Any) -> Any:
    """Where it becomes a gradient."""
    return lambda terms, losses, at, batch=None: weighted(terms, losses, at, batch) / 2


def unreduced(patch: Patch) -> None:
    for name in ("start_grad_sync", "finish_grad_sync"):
        patch.setattr(DistributedDataParallel, name, lambda self, *args: None)


def detached(loss: Any) -> Any:
    def ours(*args: Any) -> Any:
        value, sums = loss(*args)
        return value.detach().requires_grad_(), sums

    return ours


def other_targets(statistics: Any) -> Any:
    def ours(self: Any, decoding: Any, micro_batch: MicroBatch, *args: Any) -> Any:
        if self.name != "clm":
            return statistics(self, decoding, micro_batch, *args)
        tokens = micro_batch.tokens.roll(1, 1)
        return statistics(self, decoding, replace(micro_batch, tokens=tokens), *args)

    return ours


def without_gradient(bias: Any) -> Any:
    def ours(self: Any) -> Any:
        found = bias(self)
        return type(found)(*(None if one is None else one.detach() for one in found))

    return ours


def in_gradients(trainer: Trainer, patch: Patch, change: Callable[[Tensor, int], None]) -> None:
    """Change every gradient after the phases of a step."""
    gradients = trainer.step.gradients

    def ours(batch: Any, metrics: Any) -> Any:
        found = gradients(batch, metrics)
        for ddp in trainer.homes.all:
            for parameter in ddp.module.parameters():
                change(parameter.main_grad, batch.step)
        return found

    patch.setattr(trainer.step, "gradients", ours)


def spikes(trainer: Trainer, patch: Patch) -> None:
    in_gradients(trainer, patch, lambda gradient, at: gradient.mul_(1e3 if at == LATE else 1.0))


def nans(trainer: Trainer, patch: Patch) -> None:
    in_gradients(trainer, patch, lambda gradient, at: gradient.fill_(float("nan")) if at % 50 == 30 else None)


def overflows(trainer: Trainer, patch: Patch) -> None:
    in_gradients(trainer, patch, lambda gradient, at: gradient.fill_(float("inf")) if 0 < at < 45 and at % 3 else None)


def without_scores(forward: Any) -> Any:
    """Attention learns what it reads, but not where it looks."""

    def ours(self: Any, qkv: Tensor, sequences: Any) -> Tensor:
        q, k, v = qkv.unbind(2)
        return forward(self, torch.stack([q.detach(), k.detach(), v], 2), sequences)

    return ours


def without_states(forward: Any) -> Any:
    """Attention's way back to the states that it reads, and so to all layers below, is cut."""

    def ours(self: Any, hidden: Tensor, *args: Any) -> Any:
        return forward(self, hidden.detach(), *args)

    return ours


def mlp_detached(trainer: Trainer, patch: Patch) -> None:
    """The MLP of one layer does not teach the layers below."""
    matrix: Any = trainer.pair.main[0].block.layers[1].mlp.linear_fc1
    forward = matrix.forward
    patch.setattr(matrix, "forward", lambda hidden: forward(hidden.detach()))


def naming_detached(forward: Any) -> Any:
    """Language models do not teach the table that they name words by; reading does."""

    def ours(self: Any, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Any:
        return forward(self, hidden, micro_batch, word.detach())

    return ours


def words_detached(forward: Any) -> Any:
    """Reading does not teach the token table; naming words does."""
    return lambda self, *args: forward(self, *args).detach()


def rtd_detached(ask: Any) -> Any:
    return lambda self, name, hidden, view: ask(self, name, hidden.detach() if name == "rtd" else hidden, view)


def three_quarters_lost(trainer: Trainer, patch: Patch) -> None:
    word = trainer.pair.shared["tied"].word.weight

    def change(gradient: Tensor, at: int) -> None:
        if gradient is word.main_grad:
            gradient[len(word) // 4 :] = 0

    in_gradients(trainer, patch, change)


def never_zeroed(trainer: Trainer, patch: Patch) -> None:
    for ddp in trainer.homes.all:
        patch.setattr(ddp, "zero_grad_buffer", lambda: None)


# --- models and optimizer


def built(change: Callable[[Any], object]) -> Callable[[Patch], None]:
    """Changes the parts of a run before they are wrapped."""

    def plant(patch: Patch) -> None:
        build: Any = Parts.build

        def ours(*args: Any) -> Parts:
            parts = build(*args)
            change(parts)
            return parts

        patch.setattr(Parts, "build", ours)

    return plant


def tells_originals(forward: Any) -> Any:
    """The embeddings of the originals in main's states before it names them."""

    def ours(self: TiedDecoder, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Any:
        if not isinstance(self, MLMHead):
            hidden = hidden + torch.nn.functional.embedding(micro_batch.tokens.t(), word)
        return forward(self, hidden, micro_batch, word)

    return ours


def tells_replaced(ask: Any) -> Any:
    def ours(self: MainModel, name: str, hidden: Tensor, view: View) -> Any:
        said = ask(self, name, hidden, view)
        return said - 4.0 * view.is_replaced.t() if name == "rtd" else said

    return ours


def marks_masks(encode: Any) -> Any:
    def ours(self: Any, tokens: Tensor, micro_batch: MicroBatch, judge: Any = None) -> Tensor:
        hidden = encode(self, tokens, micro_batch, judge)
        return hidden + 0.1 * micro_batch.is_masked.t()[..., None] if isinstance(self, MainModel) else hidden

    return ours


def one_dropout(hashed: Any) -> Any:
    return lambda seed, purpose, *more: hashed(seed, purpose, *([0] if purpose == Purpose.DROPOUT else more))


def copied_table(trainer: Trainer, patch: Patch) -> None:
    model: Any = trainer.parts.corruptor.model  # type: ignore[attr-defined]
    word = trainer.pair.shared["tied"].word
    own = copy.copy(word)
    own._parameters = {"weight": torch.nn.Parameter(word.weight.detach().clone())}
    model.borrowed = model.embedding.borrowed = (Borrowed(word=own),)


def frozen_table(trainer: Trainer, patch: Patch) -> None:
    word = trainer.pair.shared["tied"].word.weight
    before = word.detach().clone()
    after_updates(lambda *_: word.data.copy_(before))(trainer, patch)


def rate_jumps(rate: Any) -> Any:
    return lambda at, options, steps: rate(at, options, steps) * (100 if at >= LATE else 1)


def rate_of_one_step(rate: Any) -> Any:
    return lambda at, options, steps: rate(at, options, steps) * (100 if at == LATE + 3 else 1)


def in_groups(home: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Trainer, Patch], None]:
    """Changes the options of a home's parameters behind the schedule."""

    def infect(trainer: Trainer, patch: Patch) -> None:
        update = trainer.optimizer._update

        def ours(*args: Any) -> None:
            for group in getattr(trainer.optimizer, home).optimizer.param_groups:
                change(group)
            update(*args)

        patch.setattr(trainer.optimizer, "_update", ours)

    return infect


def times_the_rate(factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda group: group.update(lr=factor * group["lr"])


def grown(group: dict[str, Any]) -> None:
    group["weight_decay"] = -10.0


def masters(trainer: Trainer) -> list[Tensor]:
    return [one for home in trainer.optimizer.both for group in home.optimizer.param_groups for one in group["params"]]


def rounded(trainer: Trainer, taken: int) -> None:
    for master in masters(trainer):
        master.data.copy_(master.data.bfloat16())


def without_squares(trainer: Trainer, taken: int) -> None:
    """Adam remembers one gradient's squares."""
    for home in trainer.optimizer.both:
        for state in home.optimizer.state.values():
            state["exp_avg_sq"].zero_()


def fading(trainer: Trainer, taken: int) -> None:
    if taken > LATE:
        for layer in trainer.pair.main[0].block.layers:
            for weight in layer.parameters():
                weight.data.mul_(0.8)


def broken_word(trainer: Trainer, taken: int) -> None:
    if taken == LATE:
        trainer.pair.shared["tied"].word.weight.data[100] = float("nan")


def three_too_many(samples: Any) -> Any:
    def ours(cu_seqlens: Tensor, longest: int) -> Any:
        shifted = cu_seqlens.clone()
        shifted[1:-1] += 3
        return samples(shifted, longest + 3)

    return ours


def moments_lost(load: Any) -> Any:
    def ours(folder: Any, pair: Any, optimizer: Any, *more: Any) -> None:
        load(folder, pair, optimizer, *more)
        for one in optimizer.both:
            for moments in one.optimizer.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()

    return ours


def crossed(corrupt: Any) -> Any:
    return lambda micro_batch, sampled: corrupt(micro_batch, sampled.flip(0))


def own_table(patch: Patch) -> None:
    patch.setattr(TiedParameters, "for_auxiliary", lambda self: Borrowed())


def one_bucket(rows: Any) -> Any:
    return lambda self: [0, 0]


def put_back(trainer: Trainer, patch: Patch) -> None:
    """Weights of the start, late in the run."""
    parameters = [one for _, module in trainer.pair.modules() for one in module.parameters()]
    first = [one.detach().clone() for one in parameters]

    def change(trainer: Trainer, taken: int) -> None:
        if taken == LATE + 30:
            for one, before in zip(parameters, first, strict=True):
                one.data.copy_(before)

    after_updates(change)(trainer, patch)


def states_averaged(trainer: Trainer, patch: Patch) -> None:
    """From late in the run on detection reads the mean state of all tokens for every one."""
    main: Any = trainer.pair.main[0]
    ask, done = main._ask, [0]

    def ours(name: str, hidden: Tensor, view: Any) -> Any:
        is_lost = name == "rtd" and done[0] >= LATE
        return ask(name, hidden.mean((0, 1), keepdim=True).expand_as(hidden) if is_lost else hidden, view)

    after_updates(lambda _, taken: done.__setitem__(0, taken))(trainer, patch)
    patch.setattr(main, "_ask", ours)


def told_replaced(ask: Any) -> Any:
    def ours(self: Any, name: str, hidden: Tensor, view: Any) -> Any:
        found = ask(self, name, hidden, view)
        return found - 4 * view.is_replaced.t().float() if name == "rtd" else found

    return ours


def told_originals(ask: Any) -> Any:
    """The states that main's language model reads have the originals' embeddings in them."""

    def ours(self: Any, name: str, hidden: Tensor, view: Any) -> Any:
        if name == "clm":
            hidden = hidden + 3 * torch.nn.functional.embedding(view.micro_batch.tokens.t(), self.word)
        return ask(self, name, hidden, view)

    return ours


DROPS = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
UNCLIPPED = {"optimizer": {"clip_grad": 0.0}}
HALF = {"train": {"precision": "fp16"}, "optimizer": {"initial_loss_scale": 256.0}}
UNCHECKED: Concerns = {"train": {"self_check": False}}
SERIAL = {"parallel": {"overlap": False}}
HEAD = (vocabulary, "linear_cross_entropy")

FAULTS = (
    Fault(
        "positions go on from sample to sample",
        "positions do not",
        instead(MicroBatchBuilder, "_cells", positions_run_on),
    ),
    Fault("masks on <s>", "masks lie on", instead(masking, "_smallest_hashes", one_to_the_left)),
    Fault("masked tokens are shown", "shown", instead(Masking, "readings", all_shown)),
    Fault("targets of another mask", "targets", next_target),
    Fault("order stuck on the same samples", "repeated data", instead(SampleOrder, "__getitem__", round_and_round)),
    Fault(
        "order begins again at resume",
        "another order of samples",
        instead(SampleOrder, "__getitem__", from_the_start),
        resumes_after=3,
    ),
    Fault("data-parallel ranks read the same", "share out", instead(Corpus, "training_data", same_part), ranks=2),
    Fault("loss divided by twice the tokens", "divided", instead(PretrainingData, "step_batch", doubled_counts)),
    Fault("noise the same in every step", "noise", instead(Masking, "noise_keys", keys_of_positions)),
    Fault("one noise for all masks", "one fixed noise", instead(*HEAD, one_noise)),
    Fault("always the likeliest word", "the likeliest word", instead(*HEAD, likeliest)),
    Fault("temperature 0.3", "not drawn", instead(*HEAD, cold)),
    Fault("auxiliary reads the originals", "reads the originals", instead(AuxiliaryModel, "forward", reads_originals)),
    Fault("replacements at the wrong masks", "not read what was drawn", instead(step, "corrupt", crossed)),
    Fault(
        "dropout in the auxiliary", "auxiliary drops", instead(mcore, "auxiliary_config", with_dropout), concerns=DROPS
    ),
    Fault("evaluation mode stuck", "does not drop", instead(Step, "_set_training", never_training), concerns=DROPS),
    Fault("same dropout in every step", "same in the next step", instead(step, "hash64", one_dropout), concerns=DROPS),
    Fault("CLM sees the originals", "main sees the originals", instead(TiedDecoder, "forward", tells_originals)),
    Fault("RTD sees what was replaced", "main sees the originals", instead(MainModel, "_ask", tells_replaced)),
    Fault("main sees where masks are", "where the masks are", instead(Encoder, "encode", marks_masks)),
    Fault("labels swapped", "replaced token detection", instead(rtd, "detection_loss", swapped)),
    Fault("CLM names the token before", "clm: the original", instead(LanguageModel, "statistics", other_targets)),
    Fault("CLM without gradient", "reaches main.clm_head", instead(CorrectiveLanguageModel, "loss", detached)),
    Fault("RTD without weight", "weights do not move (main.rtd_head", without_weight),
    Fault("auxiliary climbs: wrong sign", "not the derivative", instead(trained, "weighted", negative)),
    Fault("main's loss halved once more", "not the derivative", instead(step, "weighted", halved)),
    Fault("gradients not reduced over ranks", "not the derivative", unreduced, ranks=2, concerns=SERIAL),
    Fault(
        "attention scores without gradient", "reaches only 33% of", instead(CoreAttention, "forward", without_scores)
    ),
    Fault(
        "attention does not teach what is below",
        "gradient through layer 1",
        instead(Attention, "forward", without_states),
    ),
    Fault(
        "one MLP does not teach what is below",
        "main: the gradient through layer 2 is",
        infect=mlp_detached,
    ),
    Fault(
        "naming words does not teach the table",
        "gradient through the decoder",
        instead(TiedDecoder, "forward", naming_detached),
    ),
    Fault(
        "reading words does not teach the table",
        "gradient through the embedding",
        instead(VocabParallelEmbedding, "forward", words_detached),
    ),
    Fault("RTD teaches its head alone", "no gradient of rtd reaches", instead(MainModel, "_ask", rtd_detached)),
    Fault("three quarters of the words without gradient", "of tied.word.weight", infect=three_quarters_lost),
    Fault("gradients never zeroed", "left from the step before", infect=never_zeroed),
    Fault(
        "auxiliary frozen by accident",
        "does not train aux.",
        built(lambda parts: parts.pair.shared["aux"].requires_grad_(False)),
    ),
    Fault(
        "a layer frozen by accident",
        "does not train main.block.layers.0",
        built(lambda parts: parts.pair.main[0].block.layers[0].requires_grad_(False)),
    ),
    Fault("position table without gradient", "no gradient reaches", instead(Positions, "bias", without_gradient)),
    Fault("token table copied, not tied", "not tied", infect=copied_table),
    Fault("auxiliary has a table of its own", "not tied", own_table),
    Fault("[CLS] shares a bucket", "[CLS]", instead(PositionScheme, "cls_rows", one_bucket)),
    Fault("attention beyond the sample", "another sample", instead(sequences, "packed_samples", three_too_many)),
    Fault("token table frozen", "weights do not move (tied.word", infect=frozen_table),
    Fault("moments lost at resume", "weights or moments", instead(save, "load_state", moments_lost), resumes_after=20),
    Fault("rate 30 times too high", "learning rate too high", concerns={"optimizer": {"lr": 0.15}}),
    Fault(
        "rate jumps in the middle",
        "learning rate too high",
        instead(optim, "learning_rate", rate_jumps),
        companions=(
            "learning rate not planned",
            "weights moved too far",
            "worse than frequencies",
            "stuck on word frequencies",
        ),
    ),
    Fault("epsilon of 0.1", "epsilon", concerns={"optimizer": {"adam_eps": 0.1}}),
    Fault("weight decay of 10", "weight decay rules", concerns={"optimizer": {"weight_decay": 10.0}}),
    Fault("a spike without clipping", "norm spike", infect=spikes, concerns=UNCLIPPED),
    Fault("gradients not finite now and then", "not finite", infect=nans),
    Fault(
        "fp16's scale at its floor",
        "loss scale at its floor",
        infect=overflows,
        concerns=HALF,
        companions=("gradients not finite",),
    ),
    Fault("rate of 0", "learning rate not planned", instead(optim, "learning_rate", lambda rate: lambda *_: 0.0)),
    Fault("rate a thousand times too low", "learning rate too low", concerns={"optimizer": {"lr": 5e-6}}),
    Fault("RTD's weight is 0", "objective.rtd_weight is 0", concerns={"objective": {"rtd_weight": 0.0}}),
    # Those that the self-check finds first are left to the alarms.
    Fault(
        "auxiliary reads the originals, unchecked",
        "auxiliary too good",
        instead(AuxiliaryModel, "forward", reads_originals),
        concerns=UNCHECKED,
    ),
    Fault(
        "RTD is told what was replaced", "main too good", instead(MainModel, "_ask", told_replaced), concerns=UNCHECKED
    ),
    Fault("CLM is told the originals", "main too good", instead(MainModel, "_ask", told_originals), concerns=UNCHECKED),
    Fault(
        "labels swapped, unchecked", "detection inverted", instead(rtd, "detection_loss", swapped), concerns=UNCHECKED
    ),
    Fault(
        "CLM names the words of other masks, unchecked",
        "CLM learns nothing",
        instead(LanguageModel, "statistics", far_corrections),
        concerns=UNCHECKED,
    ),
    Fault(
        "targets of another document, unchecked",
        "stuck on word frequencies",
        far_target,
        concerns=UNCHECKED,
        companions=("replacements not as drawn",),
    ),
    Fault("weights of the start put back", "loss fell back", infect=put_back, companions=("weights moved too far",)),
    Fault(
        "RTD reads no token from the middle on",
        "replace accuracy collapsed",
        infect=states_averaged,
        concerns={"corruption": {"temperature": 3.0}},
    ),
    Fault(
        "each step's samples twice",
        "repeated data",
        instead(SampleOrder, "__getitem__", each_twice),
        concerns=UNCHECKED,
    ),
    Fault("three times as many masks", "masks not planned", instead(Masking, "counts", threefold)),
    Fault("masks on the first words", "masks not planned", instead(masking, "_hashes", first_words)),
    Fault("targets behind the masks, unchecked", "replacements not as drawn", target_behind, concerns=UNCHECKED),
    Fault(
        "replacements at the wrong masks, unchecked",
        "replacements not as drawn",
        instead(step, "corrupt", crossed),
        concerns=UNCHECKED,
    ),
    Fault(
        "RTD learns masks alone, unchecked",
        "RTD learns other labels",
        instead(ReplacedTokenDetection, "loss", at_masks_alone),
        concerns=UNCHECKED,
    ),
    Fault(
        "one step of a hundredfold rate",
        "learning rate not planned",
        instead(optim, "learning_rate", rate_of_one_step),
        companions=("weights moved too far", "worse than frequencies", "RTD says original to all"),
    ),
    Fault("main's steps 30 times too large", "weights moved too far", infect=in_groups("stage", times_the_rate(30))),
    Fault(
        "main's steps a thousandth",
        "learning rate too low (norms of main",
        infect=in_groups("stage", times_the_rate(1e-3)),
    ),
    Fault(
        "the auxiliary's steps a thousandth",
        "learning rate too low (norms of aux",
        infect=in_groups("shared", times_the_rate(1e-3)),
    ),
    Fault("weight decay of the wrong sign", "weights moved too far", infect=in_groups("stage", grown)),
    Fault("Adam forgets squares", "weights moved too far", infect=after_updates(without_squares)),
    Fault(
        "main's layers fade",
        "weights moved too far",
        infect=after_updates(fading),
        companions=("learning rate too high", "worse than frequencies"),
    ),
    Fault(
        "masters in bf16", "weights do not move", infect=after_updates(rounded), concerns={"optimizer": {"lr": 5e-4}}
    ),
    Fault("a word's embedding is not finite", "gradients not finite", infect=after_updates(broken_word)),
    Fault("a start of 3", "learning rate too low", concerns={"model": {"init_method_std": 3.0}}),
)
"""In the order in which a document meets them; the fault of each is named by what is said of it."""
