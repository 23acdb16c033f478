"""Whether gradients reach all that shall train: every parameter, and of matrices and tables every part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.views import View
from metro_megatron.health.shards import Shard
from metro_megatron.health.subject import Subject
from metro_megatron.model.encoder import AuxiliaryModel
from metro_megatron.model.init import global_parameters
from metro_megatron.model.position import Positions
from metro_megatron.objective.term import Term

MOST = 0.05
"""Share of a matrix's elements that may be without gradient: exactly 0 is where nothing was added, as what many tokens
add up to hardly ever is."""
LEAST = 16.0
"""Tokens, or samples, that dropout and early exits leave to a loss: of fewer, all may miss a weight."""
ENCODER = ("main.block.", "main.embedding.")
"""Beginnings of the names of what a loss behind main's last layer must teach by itself."""

Rows = Mapping[torch.nn.Parameter, Tensor]
"""bool [rows here] of the tables of this rank."""


def frozen(subject: Subject, own: Sequence[Shard]) -> Iterator[str]:
    """Parameters of the models that the optimizer does not hold, on some rank at least. A collective call."""
    known: dict[str, torch.nn.Parameter] = {}
    for prefix, module in subject.pair.modules():
        known |= dict(global_parameters(module, prefix))
    still = [name for name, parameter in known.items() if not parameter.requires_grad]
    everyone: list[tuple[list[str], list[str], list[str]]] = [([], [], [])] * subject.layout.world.size()
    dist.all_gather_object(everyone, (list(known), [one.name for one in own], still), group=subject.layout.world)
    names, held, frozen = (set().union(*column) for column in zip(*everyone, strict=True))
    if lacking := sorted(frozen | names - held):
        yield f"the optimizer does not train {_some(lacking)}: frozen (requires_grad), or not among its parameters"


def unreached(
    subject: Subject, batch: StepBatch, own: Sequence[Shard], views: Sequence[View], term: Term | None = None
) -> Iterator[str]:
    """Parameters that the gradients do not reach, and such of which they reach a part; of one term's gradients alone,
    main's layers and embedding that they do not reach. Nothing of terms that have nothing to teach here, or of which
    too few tokens get to the top. A collective call."""
    idle = _idle(subject, batch)
    if term in idle or len(idle) == len(subject.terms):
        return
    leave = leaving(subject.config, batch)
    if leave and (1 - leave) * (term.least_read(batch) if term else batch.num_masked) < LEAST:
        return
    rows = _rows(subject, views)
    counts = torch.stack([_counts(one, rows) for one in own]).tolist() if own else []
    everyone: list[dict[str, list[int]]] = [{}] * subject.layout.world.size()
    here = dict(zip((one.name for one in own), counts, strict=True))
    dist.all_gather_object(everyone, here, group=subject.layout.world)
    total: dict[str, list[int]] = {}
    for of_rank in everyone:
        for name, count in of_rank.items():
            total[name] = [sum(pair) for pair in zip(count, total.get(name, [0, 0, 0]), strict=True)]
    heads = tuple(f"main.{one.name}_head." for one in idle)
    names = sorted(name for name in total if (name.startswith(ENCODER) if term else not name.startswith(heads)))
    whose = f" of {term.name}" if term else ""
    if none := [name for name in names if not total[name][0]]:
        yield f"no gradient{whose} reaches {_some(none)}"
    parts = [name for name in names if total[name][0] and total[name][2] > MOST * total[name][1]]
    if parts and term is None and not hides_parts(subject.config, batch):
        _, due, lacking = total[parts[0]]
        yield f"the gradient reaches only {1 - lacking / due:.0%} of {_some(parts)}"


def hides_parts(config: Config, batch: StepBatch) -> bool:
    """Whether so few masks get through that a matrix may miss a part of its gradient."""
    drop = max(config.model.hidden_dropout, config.model.attention_dropout)
    return batch.num_masked * (1 - leaving(config, batch)) * (1 - drop) < LEAST


def leaving(config: Config, batch: StepBatch) -> float:
    """Share of the tokens that leave early."""
    exits = config.early_exit.exits_at(batch.step, config.train.train_steps)
    return exits.share if exits else 0.0


def _idle(subject: Subject, batch: StepBatch) -> list[Term]:
    """Main's terms without a weight, or without something to learn on any rank. A collective call."""
    own = [any(map(term.teaches, batch.micro_batches)) for term in subject.terms]
    taught = torch.tensor(own, dtype=torch.int64, device=subject.layout.device)
    dist.all_reduce(taught, group=subject.layout.world)
    pairs = zip(subject.terms, taught.tolist(), strict=True)
    return [term for term, ranks in pairs if not (ranks and term.weight_at(batch.step))]


def _rows(subject: Subject, views: Sequence[View]) -> Rows:
    """Rows that must have a gradient, as a model reads them at this rank's masks, or has to name them there."""
    read, named, positions = (
        torch.cat(
            [one.t().reshape(-1)[view.micro_batch.masked_index] for one, view in zip(of_views, views, strict=True)]
        )
        for of_views in zip(*((v.tokens, v.micro_batch.tokens, v.micro_batch.position_ids) for v in views), strict=True)
    )
    tensor, found = subject.layout.tensor, {}
    for _, module in subject.pair.modules():
        for one in module.modules():
            if isinstance(one, VocabParallelEmbedding):
                is_due = torch.zeros(len(one.weight) * tensor.size(), dtype=torch.bool, device=read.device)
                is_due[named if isinstance(module, AuxiliaryModel) else read] = True
                found[one.weight] = is_due.chunk(tensor.size())[tensor.rank()]
            elif isinstance(one, torch.nn.Embedding):
                is_due = torch.zeros(len(one.weight), dtype=torch.bool, device=read.device)
                is_due[positions] = True
                found[one.weight] = is_due
            elif isinstance(one, Positions) and one.scheme.buckets is not None:
                found[one.weight] = torch.zeros(len(one.weight), dtype=torch.bool, device=read.device)
    return found


def _counts(one: Shard, rows: Rows) -> Tensor:
    """int64 [3] elements that have a gradient, that must have one, and of these, how many have none."""
    is_zero = one.gradient == 0
    where = torch.full_like(is_zero, one.parameter.dim() > 1)  # a key's bias has none, but for rounding
    if one.parameter in rows:
        of_all = rows[one.parameter].repeat_interleave(one.parameter.size(1))
        where = of_all[one.first : one.first + len(is_zero)]
    return torch.stack([(~is_zero).sum(), where.sum(), (where & is_zero).sum()])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
