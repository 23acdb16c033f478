"""What the main model reads: a micro batch with some of its tokens replaced, alone or beside a second view of it.

Legend: B rows, S positions, M masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metro_megatron.config.early_exit import Exits
from metro_megatron.data.batch import MicroBatch


@dataclass(frozen=True)
class View:
    """A micro batch as main reads it."""

    tokens: Tensor
    """int64 [B, S] corrupted ids."""
    micro_batch: MicroBatch
    exits: Exits | None = None
    """Where tokens leave main; None: nowhere, as in evaluation."""

    @property
    def is_replaced(self) -> Tensor:
        """bool [B, S] where another token stands than the original one."""
        return self.tokens != self.micro_batch.tokens

    @property
    def first_index(self) -> Tensor:
        """int64 [n] index of each sample's first token, <s>, in hidden_states.flatten(0, 1), as masked_index."""
        micro_batch = self.micro_batch
        rows, length = self.tokens.shape
        is_sample = micro_batch.sample_lengths > 0
        if micro_batch.is_packed:
            return micro_batch.cu_seqlens[:-1].long()[is_sample]  # one row: the index is the position
        return torch.arange(rows, device=self.tokens.device)[is_sample]  # position 0 of every row


def corrupt(micro_batch: MicroBatch, sampled: Tensor) -> View:
    """X_noise: the original ids with the samples [M] at the masked positions."""
    rows, length = micro_batch.tokens.shape
    tokens = micro_batch.tokens.t().flatten()  # masked_index counts in [S, B] order
    tokens = tokens.index_copy(0, micro_batch.masked_index, sampled)
    return View(tokens.view(length, rows).t().contiguous(), micro_batch)


def side_by_side(first: View, second: View) -> View:
    """Both as one, of twice as many positions or rows, so that main reads them in one pass.

    The second's samples count as padding for every loss that looks at real or masked tokens. Their dropout differs
    from the first's: sample id s becomes -2 - s. Rows, packed or padded, are of one shape in both.
    """
    one, other = first.micro_batch, second.micro_batch
    assert first.tokens.shape == second.tokens.shape and one.is_packed == other.is_packed
    rows, length = first.tokens.shape
    masked_index = one.masked_index
    if one.is_packed:
        # Samples must follow one another without a gap: the second row begins where the first one's samples end, and
        # what the first left empty comes last.
        end = one.sample_lengths.sum()
        position = torch.arange(2 * length, device=end.device)
        is_second = (position >= end) & (position < end + length)
        order = torch.where(
            position < end, position, torch.where(is_second, position - end + length, position - length)
        )
    else:
        masked_index = masked_index.div(rows, rounding_mode="floor") * 2 * rows + masked_index % rows

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)[:, order] if one.is_packed else torch.cat([a, b])

    joined = replace(
        one,
        tokens=join(one.tokens, other.tokens),
        masked_tokens=join(one.masked_tokens, other.masked_tokens),
        position_ids=join(one.position_ids, other.position_ids),
        is_real=join(one.is_real, torch.zeros_like(other.is_real)),
        masked_index=masked_index,
        sample_lengths=torch.cat([one.sample_lengths, other.sample_lengths]),
        sample_ids=torch.cat([one.sample_ids, -2 - other.sample_ids]),
        max_seqlen=max(one.max_seqlen, other.max_seqlen),
    )
    return replace(first, tokens=join(first.tokens, second.tokens), micro_batch=joined)
