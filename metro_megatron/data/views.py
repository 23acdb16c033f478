"""What the main model reads: a micro batch with some of its tokens replaced, alone or beside a second view of it.

Legend: B rows, S positions, M masked positions, n samples' tokens, C ids.
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
    distractors: Tensor | None = None
    """int64 [M, C] other ids than the originals, where a loss wants some."""
    exits: Exits | None = None
    """Where tokens leave main; None: nowhere, as in evaluation."""

    @property
    def is_replaced(self) -> Tensor:
        """bool [B, S] where another token stands than the original one."""
        return self.tokens != self.micro_batch.tokens


def corrupt(micro_batch: MicroBatch, sampled: Tensor) -> View:
    """X_noise: the original ids with the samples [M] at the masked positions."""
    rows, length = micro_batch.tokens.shape
    tokens = micro_batch.tokens.t().flatten()  # masked_index counts in [S, B] order
    tokens = tokens.index_copy(0, micro_batch.masked_index, sampled)
    return View(tokens.view(length, rows).t().contiguous(), micro_batch)


def crop(micro_batch: MicroBatch, share: float, pad_id: int) -> MicroBatch:
    """Of every sample a span of int(share n) of its n original tokens that begins anywhere, and nothing masked.

    <s> is put before a span that lost it (COCO-LM). Where it begins is a function of the sample's crop key alone.
    """
    assert micro_batch.crop_keys is not None
    rows, length = micro_batch.tokens.shape
    whole = micro_batch.sample_lengths.long()
    span = torch.minimum((whole.double() * share).long().clamp(min=1), whole)
    begin = micro_batch.crop_keys % (whole - span + 1)
    is_cut = (begin > 0).long()
    lengths = span + is_cut
    column = torch.arange(length, device=whole.device).expand(rows, length)
    sample = torch.arange(rows, device=whole.device)[:, None].expand(rows, length)
    offset, first = column, torch.zeros_like(column)
    if micro_batch.is_packed:
        ends = lengths.cumsum(0)
        sample = torch.bucketize(column, ends, right=True).clamp(max=len(ends) - 1)
        offset = column - (ends - lengths)[sample]
        first = (whole.cumsum(0) - whole)[sample]
    is_real = offset < lengths[sample]
    source = first + torch.where(offset > 0, offset + (begin - is_cut)[sample], 0)
    tokens = micro_batch.tokens.gather(1, source.clamp(max=length - 1)).masked_fill(~is_real, pad_id)
    return replace(
        micro_batch,
        tokens=tokens,
        masked_tokens=tokens,
        position_ids=offset.masked_fill(~is_real, 0),
        is_real=is_real,
        masked_index=micro_batch.masked_index[:0],
        noise_keys=micro_batch.noise_keys[:0],
        sample_lengths=lengths.int(),
    )


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
        num_samples=one.num_samples + other.num_samples,
    )
    return replace(first, tokens=join(first.tokens, second.tokens), micro_batch=joined)
