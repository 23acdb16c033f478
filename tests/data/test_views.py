"""Views of a micro batch by hand: samples put in, and two of them beside each other."""

import itertools
from dataclasses import replace

import pytest
import torch

from metro_megatron.config.early_exit import Exits
from metro_megatron.data.batch import MicroBatch
from metro_megatron.data.views import View, corrupt, crop, side_by_side

PACKED = MicroBatch(
    tokens=torch.tensor([[0, 10, 11, 2, 0, 12, 2, 1]]),
    masked_tokens=torch.tensor([[0, 4, 11, 2, 0, 4, 2, 1]]),
    position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
    is_real=torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]).bool(),
    masked_index=torch.tensor([1, 5]),
    noise_keys=torch.zeros(2, 2, dtype=torch.int32),
    sample_lengths=torch.tensor([4, 3], dtype=torch.int32),
    sample_ids=torch.tensor([7, 8]),
    is_packed=True,
    max_seqlen=4,
    num_samples=2,
)
PADDED = MicroBatch(
    tokens=torch.tensor([[0, 10, 11, 2], [0, 12, 2, 1]]),
    masked_tokens=torch.tensor([[0, 4, 11, 2], [0, 4, 2, 1]]),
    position_ids=torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]]),
    is_real=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
    masked_index=torch.tensor([2, 3]),  # position 1 of rows 0 and 1
    noise_keys=torch.zeros(2, 2, dtype=torch.int32),
    sample_lengths=torch.tensor([4, 3], dtype=torch.int32),
    sample_ids=torch.tensor([7, 8]),
    is_packed=False,
    max_seqlen=4,
    num_samples=2,
)


@pytest.mark.parametrize("micro_batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_samples_stand_at_the_masks_and_nowhere_else(micro_batch: MicroBatch) -> None:
    view = corrupt(micro_batch, torch.tensor([10, 99]))
    assert torch.equal(view.tokens, micro_batch.tokens.where(micro_batch.tokens != 12, 99))
    assert view.is_replaced.sum() == 1, "a sample that is the original id is an original"
    assert view.tokens.t().flatten()[view.micro_batch.first_index].tolist() == [0, 0]


@pytest.mark.parametrize("micro_batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_second_view_follows_the_first_and_counts_for_no_other_loss(micro_batch: MicroBatch) -> None:
    first = replace(corrupt(micro_batch, torch.tensor([90, 91])), exits=Exits((1,), 0.5))
    both = side_by_side(first, View(micro_batch.tokens, micro_batch))
    joined = both.micro_batch
    assert both.exits == first.exits, "its samples leave main as the first one's do"
    assert both.tokens.numel() == 2 * micro_batch.tokens.numel()
    assert joined.sample_lengths.tolist() == [4, 3, 4, 3] and joined.sample_ids.tolist() == [7, 8, -9, -10]
    flat, originals = both.tokens.t().flatten(), joined.tokens.t().flatten()
    assert flat[joined.masked_index].tolist() == [90, 91] and originals[joined.masked_index].tolist() == [10, 12]
    assert joined.is_real.sum() == micro_batch.is_real.sum() == 7
    assert both.is_replaced.sum() == 2 and not (both.is_replaced & ~joined.is_real).any()
    assert flat[both.micro_batch.first_index].tolist() == [0] * 4 and len(both.micro_batch.first_index) == 4
    if micro_batch.is_packed:
        assert both.tokens.tolist() == [[0, 90, 11, 2, 0, 91, 2, 0, 10, 11, 2, 0, 12, 2, 1, 1]]
        assert joined.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 0]]
        assert joined.cu_seqlens.tolist() == [0, 4, 7, 11, 14]
    else:
        assert both.tokens.tolist() == [[0, 90, 11, 2], [0, 91, 2, 1], [0, 10, 11, 2], [0, 12, 2, 1]]


def test_rows_without_a_sample_have_no_first_token() -> None:
    empty = MicroBatch(
        *(torch.full((1, 4), value) for value in (1, 1, 0)),
        is_real=torch.zeros(1, 4, dtype=torch.bool),
        masked_index=torch.empty(0, dtype=torch.int64),
        noise_keys=torch.empty(0, 2, dtype=torch.int32),
        sample_lengths=torch.tensor([0], dtype=torch.int32),
        sample_ids=torch.tensor([-1]),
        is_packed=True,
        max_seqlen=0,
        num_samples=0,
    )
    view = corrupt(empty, torch.empty(0, dtype=torch.int64))
    both = side_by_side(view, view)
    assert len(view.micro_batch.first_index) == len(both.micro_batch.first_index) == 0 and both.tokens.tolist() == [
        [1] * 8
    ]
    half = replace(PADDED, sample_lengths=torch.tensor([4, 0], dtype=torch.int32), num_samples=1)
    assert half.first_index.tolist() == [0]
    assert side_by_side(View(half.tokens, half), View(half.tokens, half)).micro_batch.first_index.tolist() == [0, 2]


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, 0.01])
@pytest.mark.parametrize("micro_batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_crop_is_a_span_of_the_original_with_its_first_token(micro_batch: MicroBatch, share: float) -> None:
    """Against slices of lists, for every beginning that the keys can give."""
    samples = [[0, 10, 11, 2], [0, 12, 2]]
    for keys in itertools.product(range(5), repeat=2):
        cropped = crop(replace(micro_batch, crop_keys=torch.tensor(keys)), share, pad_id=1)
        wanted = []
        for ids, key in zip(samples, keys, strict=True):
            size = max(1, int(share * len(ids)))
            begin = key % (len(ids) - size + 1)
            wanted.append([0] * (begin > 0) + ids[begin : begin + size])
        rows = [sum(wanted, [])] if micro_batch.is_packed else wanted
        width = micro_batch.tokens.size(1)
        assert cropped.tokens.tolist() == [row + [1] * (width - len(row)) for row in rows]
        assert cropped.is_real.tolist() == [[True] * len(row) + [False] * (width - len(row)) for row in rows]
        assert cropped.sample_lengths.tolist() == list(map(len, wanted))
        places = [list(range(len(ids))) for ids in wanted]
        places = [sum(places, [])] if micro_batch.is_packed else places
        assert cropped.position_ids.tolist() == [row + [0] * (width - len(row)) for row in places]
        assert not len(cropped.masked_index) and torch.equal(cropped.masked_tokens, cropped.tokens)
