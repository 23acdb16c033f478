"""Where the samples of a micro batch lie, and the names by which dropout knows its rows; every layer is handed one.

Legend: S positions, B rows, n samples, R = S B rows of hidden states, or this rank's part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from fused.attention import Dropout, Samples, packed_samples, padded_samples
from fused.layer_norm import RowDropout
from metro_megatron.data.batch import MicroBatch
from metro_megatron.model.position import Added

if TYPE_CHECKING:
    from metro_megatron.model.early_exit import ActiveRows

EMBEDDING_SITE = 0
AUXILIARY_SEEDS = -(1 << 62)
"""Added to the step's seed in the auxiliary model: main's are from 0 to 2^62 (train/step.py), so that all of these are
negative and no mask is drawn twice."""


class LayerSites(NamedTuple):
    """Where a layer drops, as indices into DropoutKeys.seeds: no two sites of a model draw from one seed."""

    attention: int
    after_attention: int
    after_mlp: int


def sites_of_layer(layer_number: int) -> LayerSites:
    """Of layer 1, 2, ... from the bottom of the whole encoder: three each, after the embedding's."""
    first = EMBEDDING_SITE + 1 + len(LayerSites._fields) * (layer_number - 1)
    return LayerSites(first, first + 1, first + 2)


@dataclass(frozen=True)
class DropoutKeys:
    """Masks are functions of the step, the site in the model, the sample, position, head and column alone.

    So they do not depend on the layout of processes, on packing or on recomputation.
    """

    seeds: Tensor
    """int64 [sites, 2]: one seed for every site in the model, 16 bytes apart."""
    samples: Tensor
    """int64 [n] sample ids."""
    rows: Tensor
    """int64 [R] sample id and position of each row."""

    def of_rows(self, rate: float, site: int, is_last: bool = False) -> RowDropout:
        """For the rows of hidden states."""
        return RowDropout(rate, self.seeds[site, :1], self.rows, is_last)

    def of_attention(self, rate: float, site: int, first_head: int) -> Dropout:
        """For attention probabilities of the heads from first_head on."""
        return Dropout(rate, self.seeds[site, :1], self.samples, first_head)


@dataclass
class Sequences(PackedSeqParams):
    """megatron-core's description of packed sequences, whose format it reads, with ours; for padded rows too."""

    samples: Samples | None = None
    dropout: DropoutKeys | None = None
    """None where nothing is dropped."""
    added: Added = Added(None, None)
    """To the scores of every layer, by the encoder's positions."""
    judge: Callable[[str, Tensor, Sequences], Tensor] | None = None
    """What a head on a middle layer asks for its loss: name, hidden states [S, B, H], and this."""
    active: dict[int, ActiveRows] = field(default_factory=dict)
    """Which rows are updated behind each main layer where tokens left, from the lowest up."""

    def rows_of_layer(self, layer_number: int) -> ActiveRows | None:
        """Those that layer 1, 2, ... updates; None: all."""
        return next((rows for layer, rows in reversed(self.active.items()) if layer < layer_number), None)


def sequences_of(micro_batch: MicroBatch, num_layers: int, sequence_group: ProcessGroup | None) -> Sequences:
    """Of a micro batch for a model of num_layers; sequence_group splits positions where they are split."""
    longest = max(micro_batch.max_seqlen, 1)
    dropout = None
    if micro_batch.dropout_seed is not None:
        sites = torch.arange(sites_of_layer(num_layers).after_mlp + 1, device=micro_batch.tokens.device)
        rows = micro_batch.token_keys.t().reshape(-1)
        if sequence_group is not None:
            rows = rows.chunk(sequence_group.size())[sequence_group.rank()]
        seeds = (micro_batch.dropout_seed + sites)[:, None].expand(-1, 2).contiguous()
        dropout = DropoutKeys(seeds, micro_batch.sample_ids, rows)
    if micro_batch.is_packed:
        return Sequences(qkv_format="thd", samples=packed_samples(micro_batch.cu_seqlens, longest), dropout=dropout)
    samples = padded_samples(micro_batch.sample_lengths, micro_batch.tokens.size(1))
    return Sequences(qkv_format="sbhd", samples=samples, dropout=dropout)
