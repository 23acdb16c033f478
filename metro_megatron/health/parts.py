"""What must hold of every part by itself: its backward pass is the derivative of its forward pass.

In the whole model a path without gradients hides beside another one that brings most of them to the same parameters. A
part's output is many numbers, where a loss is one, and attention and MLP can be made as loud as the way past them.

Legend: S positions, B rows, H hidden, M masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from metro_megatron.data.batch import MicroBatch, StepBatch
from metro_megatron.health.gradients import TOLERANCE
from metro_megatron.health.subject import Subject
from metro_megatron.model.encoder import Embedding, Encoder
from metro_megatron.model.heads import TiedDecoder
from metro_megatron.objective.vocabulary import vocabulary_statistics

STEP = 0.05
"""How far what a part reads is moved, as a share of its size."""
SHARES = (1.0, 1 / 4, 4.0)
"""Of that step, until one agrees: a wrong gradient stays wrong, but a bent function straightens on a shorter one, and
rounding is less of a longer one."""
SMALL = 1 / 4
"""Tokens whose states are smaller, as a share of the usual size, are left out: a norm makes much of next to nothing, as
padding may be, or what dropout has left."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module was called with."""


@dataclass(frozen=True)
class Part:
    """A function of one tensor, which is moved where it lies."""

    model: str
    what: str
    run: Callable[[], Tensor]
    reads: Tensor
    direction: Tensor
    """Of a size about 1, broadcast to what is read; alike on ranks that hold the same."""
    splits: tuple[bool, bool]
    """Whether tensor-parallel ranks hold parts of what is read, and of the output; else they hold the same."""


@torch.no_grad()
def problems(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch]) -> Iterator[str]:
    """Of micro batches on the device, while the modules train and no token leaves early. Collective calls."""
    wrong: dict[str, dict[str, float]] = {}
    # FP8 rounds too much away; what backward makes again can be asked for all gradients only, not for one.
    with subject.configured(fp8=None, recompute_modules=[]):
        for part in _parts(subject, _calls(subject, batch, micro_batches)):
            ratio = _agreement(subject, part)
            if abs(ratio - 1) > TOLERANCE[subject.config.train.precision]:
                wrong.setdefault(part.model, {})[part.what] = ratio
    for model, ratios in wrong.items():
        what, ratio = next(iter(ratios.items()))
        more = f" (and {len(ratios) - 1} parts more)" if len(ratios) > 1 else ""
        yield (
            f"{model}: the gradient through {what}{more} is {ratio:.2f} of what its output changes by: a way through "
            "it has none, or a wrong one"
        )


def _calls(subject: Subject, batch: StepBatch, micro_batches: list[MicroBatch]) -> dict[nn.Module, Call]:
    """The last ones of both models' parts in a step."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = args, kwargs

    with ExitStack() as stack:
        for _, _, module in _modules(subject):
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        views = subject.step.exchange(micro_batches, subject.step.propose(micro_batches, batch, subject.new_sums()))
        subject.step.read(views, batch, subject.new_sums())
    return calls


def _modules(subject: Subject) -> Iterator[tuple[str, Encoder, nn.Module]]:
    """(which model, the encoder whose table it uses, part)."""
    for _, module in subject.pair.modules():
        model, encoder = "main", module
        if module not in subject.pair.main:
            # Where main's own layers propose, a head is all that is the auxiliary's.
            model, encoder = "auxiliary", module if isinstance(module, Encoder) else subject.pair.main[0]
        for one in module.modules():
            if isinstance(one, (TransformerLayer, Embedding, TiedDecoder)):
                yield model, encoder, one


def _parts(subject: Subject, calls: dict[nn.Module, Call]) -> Iterator[Part]:
    for model, encoder, module in _modules(subject):
        if module not in calls:
            continue
        args, kwargs = calls[module]
        if isinstance(module, TransformerLayer):
            yield _layer(subject, model, module, *args, **kwargs)
        elif isinstance(module, Embedding):
            yield _embedding(subject, model, encoder, module, args)
        elif args[1].masked_index.numel():
            run = partial(_losses, subject, module, *args)
            yield _of_table(model, "the decoder", run, encoder.word, False)


def _of_table(model: str, what: str, run: Callable[[], Tensor], table: Tensor, splits_output: bool) -> Part:
    generator = torch.Generator(table.device).manual_seed(0)
    direction = torch.randn(table.shape, generator=generator, device=table.device)
    return Part(model, what, run, table, direction, (True, splits_output))


def _embedding(subject: Subject, model: str, encoder: Encoder, module: Embedding, args: tuple[Any, ...]) -> Part:
    is_usual = _usual(subject, module(*args))
    splits = module.config.sequence_parallel
    return _of_table(model, "the embedding", lambda: module(*args)[is_usual], encoder.word, splits)


def _losses(subject: Subject, head: nn.Module, hidden: Tensor, micro_batch: MicroBatch, word: Tensor) -> Tensor:
    """[M] of a language model."""
    decoding = head(hidden, micro_batch, word)
    targets = micro_batch.masked_targets
    return vocabulary_statistics(decoding, targets, subject.config.model, subject.layout.tensor).loss


def _layer(subject: Subject, model: str, layer: TransformerLayer, hidden_states: Tensor, **kwargs: Any) -> Part:
    """A function of its states [S, B, H], all of which are moved alike: else attention would average it away."""
    states, sequences = hidden_states.clone(), replace(kwargs["packed_seq_params"], judge=None)
    is_usual, size = _usual(subject, states), _size(subject, states)
    loudness: dict[nn.Module, float] = {}

    def louder(module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        made, bias = output
        if module not in loudness:
            own = _size(subject, made[is_usual])
            loudness[module] = size / own if own else 1.0
        return made * loudness[module], bias

    def run() -> Tensor:
        with ExitStack() as stack:
            for writes in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                stack.callback(writes.register_forward_hook(louder).remove)
            output, _ = layer(hidden_states=states, packed_seq_params=sequences)
        return output[is_usual]

    generator = torch.Generator(states.device).manual_seed(0)
    direction = torch.randn(states.size(-1), generator=generator, device=states.device) * is_usual[..., None]
    splits = (layer.config.sequence_parallel,) * 2
    return Part(model, f"layer {layer.layer_number}", run, states.requires_grad_(), direction, splits)


def _usual(subject: Subject, states: Tensor) -> Tensor:
    """bool [S, B] of states [S, B, H]: tokens whose states are not small."""
    return states.float().square().mean(-1).sqrt() >= SMALL * _size(subject, states)


def _agreement(subject: Subject, part: Part) -> float:
    """What the gradient says of the way in which the output changes, as a share of how it does. Collective calls."""
    reads, before = part.reads, part.reads.detach().clone()
    step = STEP * _size(subject, before)
    if not 0 < step < torch.inf:
        return 1.0
    splits_reading, splits_output = part.splits
    asked = gradient = None
    ratio = 1.0
    for share in SHARES:
        places, outputs = [], []
        for sign in (1, -1):
            reads.copy_(before + sign * share * step * part.direction)
            places.append(reads.detach().clone())
            outputs.append(part.run().float())
        moved, change = places[0].float() - places[1].float(), outputs[0] - outputs[1]
        reads.copy_(before)
        if asked is None or gradient is None:
            largest = _size(subject, change)
            asked = change / largest if largest else change
            gradient = _gradient(part, asked)
        found = _product(subject, asked, change, splits_output)
        ratio = _product(subject, gradient, moved, splits_reading) / found if found else 0.0
        if abs(ratio - 1) <= TOLERANCE[subject.config.train.precision]:
            break
    return ratio


def _gradient(part: Part, asked: Tensor) -> Tensor:
    """Of the output's product with what is asked, by what the part reads."""
    with torch.enable_grad():
        output = part.run()
    if not output.requires_grad:
        return torch.zeros_like(part.reads)
    (gradient,) = torch.autograd.grad(output, part.reads, asked.to(output.dtype), materialize_grads=True)
    return gradient


def _size(subject: Subject, x: Tensor) -> float:
    """Root of the mean square over tensor-parallel ranks; 0 of nothing."""
    both = torch.stack(
        [torch.linalg.vector_norm(x, dtype=torch.float64).square(), x.new_tensor(x.numel(), dtype=torch.float64)]
    )
    dist.all_reduce(both, group=subject.layout.tensor)
    total, count = both.tolist()
    return (total / max(count, 1)) ** 0.5


def _product(subject: Subject, x: Tensor, y: Tensor, splits: bool) -> float:
    """Sum of the products; splits: tensor-parallel ranks hold parts, else each all."""
    total = (x.float() * y).sum(dtype=torch.float64)
    dist.all_reduce(total, group=subject.layout.tensor)
    return float(total) if splits else float(total) / subject.layout.tensor.size()
