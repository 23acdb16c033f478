"""Adaptive early exit: which tokens leave the main encoder behind a layer, and layers for those that stay.

Of the paper (arXiv 2110.06620) only the abstract is public: in ELECTRA's pretraining, later layers are relieved of
features that earlier ones represent already. Everything else is our interpretation. A token that has left keeps its
hidden state to the top, where the heads read it as any other. In the layers above its exit

- its keys and values are projected from that state with each layer's own weights, and attention runs over all tokens,
- its query, the output projection, the MLP and norms that no key needs are skipped: those run on rows gathered to a
  capacity that is known on the host.

Legend: S positions, B rows, H hidden, R = S B rows of hidden states, C rows that a layer computes, n samples, L the
longest sample, N heads of this rank, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional

from fused.dropout import philox
from metro_megatron.config.early_exit import LEVELS, Exits
from metro_megatron.model.attention import Attention
from metro_megatron.model.recompute import remade
from metro_megatron.model.sequences import DropoutKeys, Sequences, sites_of_layer

Rule = Literal["confidence", "random"]


@dataclass(frozen=True)
class ActiveRows:
    """The rows of hidden states that the layers behind an exit update."""

    index: Tensor
    """int64 [C] rows that are computed: all active ones, ascending, and others that fill up what capacity is left."""
    rest: Tensor
    """int64 [R - C] all other rows."""
    is_active: Tensor
    """bool [R] rows whose new state counts."""
    dropout: DropoutKeys | None
    """Keys of the rows of index."""

    def gather(self, x: Tensor) -> Tensor:
        """[S, B, ...] to the rows that are computed, [C, 1, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)[:, None]

    def put_back(self, before: Tensor, after: Tensor) -> Tensor:
        """[S, B, H]: `after` [C, 1, H] where a row is active, `before` [S, B, H] where it has left."""
        rows = before.flatten(0, 1)
        counts = self.is_active.index_select(0, self.index)[:, None]
        changed = torch.where(counts, after.squeeze(1), rows.index_select(0, self.index))
        return rows.index_copy(0, self.index, changed).view(before.shape)

    def join(self, computed: Tensor, rest: Tensor) -> Tensor:
        """[C, ...] and [R - C, ...] to [R, ...]."""
        order = torch.cat([self.index, self.rest])
        return torch.cat([computed, rest]).index_select(0, order.argsort())


def attend(
    attention: Attention, hidden: Tensor, sequences: Sequences, rows: ActiveRows
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of the rows that are computed, [C, 1, H], among all of hidden [S, B, H]; and the last bias."""
    computed = attention.heads(attention.linear_qkv(rows.gather(hidden))[0])  # [C, N, 3, K]
    frozen = hidden.flatten(0, 1).index_select(0, rows.rest)
    # Nobody reads what attention says to the queries of rows that have left: zeros.
    rest = functional.pad(_keys_and_values(attention, frozen), (0, 0, 1, 0))

    def attend_all(qkv: Tensor) -> Tensor:
        return rows.gather(attention.core_attention(qkv, sequences).view(*hidden.shape[:2], -1))

    return remade(attention.config, "core_attn", attend_all, attention.linear_proj, rows.join(computed, rest))


def _keys_and_values(attention: Attention, rows: Tensor) -> Tensor:
    """Of [R - C, H], [R - C, N, 2, K]: two thirds of the projection; q, k and v of a head stand together."""
    heads, width = attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head
    weight, bias = (
        x.unflatten(0, (heads, 3, width))[:, 1:].flatten(0, 2)
        for x in (attention.linear_qkv.weight, attention.linear_qkv.bias)
    )
    rows = copy_to_tensor_model_parallel_region(rows, attention.pg_collection.tp)
    return functional.linear(rows, weight, bias).unflatten(1, (heads, 2, width))


@dataclass(frozen=True)
class Exit:
    """What happens behind an exit layer."""

    logits: Tensor
    """[S, B] of replaced token detection."""
    goes_on: Tensor
    """bool [S, B] tokens that the next layer updates."""


class ExitHead(torch.nn.Module):
    """Decides behind a layer which tokens leave. It has no weights: the head of replaced token detection is asked.

    Of every sample of L tokens the floor(L staying / LEVELS) that are least sure stay (config/early_exit.py): the
    threshold is a quantile of the sample's own confidences |2 sigmoid(r) - 1|, so that neither rows nor micro batches
    nor ranks change it. They are ordered by |r|, which is the same order and does not saturate; among equals the first
    ones stay. rule `random`, the control: as many leave, drawn by step, layer, sample and position.
    """

    of = "rtd"
    """The loss whose head is asked."""

    def __init__(self, layer: int, rule: Rule):
        super().__init__()
        self.layer, self.rule = layer, rule

    def forward(self, logits: Tensor, sequences: Sequences, exits: Exits | None) -> Exit:
        """logits [S, B]. The decision is kept in sequences for the layers above; recomputation finds it there."""
        if exits is not None and exits.staying(self.layer) < LEVELS and self.layer not in sequences.active:
            with torch.no_grad():
                sequences.active[self.layer] = self._choose(logits.flatten(), sequences, exits.staying(self.layer))
        rows = sequences.active.get(self.layer)
        goes_on = torch.ones_like(logits, dtype=torch.bool) if rows is None else rows.is_active.view(logits.shape)
        return Exit(logits, goes_on)

    def _choose(self, logits: Tensor, sequences: Sequences, staying: int) -> ActiveRows:
        samples, before = sequences.samples, sequences.rows_of_layer(self.layer)
        assert samples is not None
        sureness = self._random(sequences) if self.rule == "random" else logits.float().abs()
        if before is not None:
            sureness = sureness.masked_fill(~before.is_active, torch.inf)
        num_rows, place = len(logits), torch.arange(samples.longest, device=logits.device)
        row = (samples.begin[:, None] + place * samples.stride).clamp(max=num_rows - 1)  # [n, L]
        behind_end = place >= samples.length[:, None]
        order = sureness[row].masked_fill(behind_end, torch.inf).argsort(dim=1, stable=True)
        stays = place < (samples.length.long() * staying // LEVELS)[:, None]
        # Whoever leaves is written to a row behind the last one: a mask as index would wait for the device.
        chosen = torch.where(stays, row.gather(1, order), num_rows)
        is_active = torch.zeros(num_rows + 1, dtype=torch.bool, device=logits.device)
        is_active = is_active.index_fill_(0, chosen.flatten(), True)[:-1]
        first = (~is_active).to(torch.uint8).argsort(stable=True)
        index, rest = first.tensor_split([num_rows * staying // LEVELS])
        keys = sequences.dropout
        return ActiveRows(index, rest, is_active, keys and replace(keys, rows=keys.rows[index]))

    def _random(self, sequences: Sequences) -> Tensor:
        """[R] uniform; the last counter parts them from dropout's masks of the same seed."""
        keys = sequences.dropout
        assert keys is not None, "only training has a step to draw by"
        seed = keys.seeds[sites_of_layer(self.layer).after_mlp, :1]
        return philox(seed, 0, keys.rows, keys.rows >> 32, 1)[0].double()
