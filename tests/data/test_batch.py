from dataclasses import replace

import numpy as np
import pytest
import torch

from metro_megatron.config.rows import RowRule
from metro_megatron.config.schema import DataConfig, ParallelConfig
from metro_megatron.data.batch import MicroBatchBuilder, StepRows
from metro_megatron.data.masking import Masking
from metro_megatron.data.order import Draws
from metro_megatron.data.samples import build_sample_index
from metro_megatron.vocabulary import MASK_ID


def builder_of(shards, seq_length, probability=0.15, is_packed=True):
    return MicroBatchBuilder(
        index=build_sample_index(shards, seq_length),
        streams=[shard.tokens for shard in shards],
        masking=Masking(1, probability),
        is_packed=is_packed,
    )


def draws_of(*samples):
    return Draws(np.zeros(len(samples), np.int64), np.array(samples, dtype=np.int64))


def rows_of(*rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def test_a_packed_row_by_hand(make_shard):
    builder = builder_of([make_shard([[2], [3], [1]])], seq_length=5)
    batch = builder.build(rows_of([0, 1]), 14, draws_of(1, 0))
    assert batch.tokens.tolist() == [[0, 7, 8, 9, 2, 0, 5, 6, 2, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0, 0, 0]]
    assert batch.is_real.tolist() == [[True] * 9 + [False] * 5]
    assert batch.sample_lengths.tolist() == [5, 4]
    assert batch.sample_ids.tolist() == [1, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.is_packed, batch.max_seqlen) == (True, 5)


def test_padded_rows_by_hand(make_shard):
    shards = [make_shard([[2]]), make_shard([[3]], 1)]
    builder = builder_of(shards, seq_length=5, probability=1.0, is_packed=False)
    batch = builder.build(rows_of([1], [], [0]), 5, draws_of(0, 1))
    far = 10**6 + 5
    assert batch.tokens.tolist() == [[0, far, far + 1, far + 2, 2], [1] * 5, [0, 5, 6, 2, 1]]
    assert batch.masked_tokens.tolist() == [[0, 4, 4, 4, 2], [1] * 5, [0, 4, 4, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0] * 5, [0, 1, 2, 3, 0]]
    assert batch.sample_lengths.tolist() == [5, 0, 4]
    assert batch.sample_ids.tolist() == [1, -1, 0]
    assert (batch.is_packed, batch.max_seqlen) == (False, 5)
    assert batch.masked_index.tolist() == [1 * 3 + 0, 1 * 3 + 2, 2 * 3 + 0, 2 * 3 + 2, 3 * 3 + 0]
    assert batch.masked_targets.tolist() == [far, 5, far + 1, 6, far + 2]
    masking = Masking(1, 1.0)
    expected = masking.noise_keys(draws_of(1, 0, 1, 0, 1), np.array([1, 1, 2, 2, 3]))
    assert batch.noise_keys.tolist() == expected.tolist()


def test_what_is_kept_or_random_is_masked_all_the_same(make_shard):
    """Index, targets and noise are those of plain masks; only what is read differs."""
    shard = make_shard([[60]])
    masked = {}
    for name, shares in {"hidden": (0.0, 0.0), "shown": (0.3, 0.3), "kept": (1.0, 0.0)}.items():
        builder = replace(builder_of([shard], 62), masking=Masking(1, 0.5, *shares, vocab_size=300))
        masked[name] = builder.build(rows_of([0]), 62, draws_of(0))
    for batch in masked.values():
        for name in ("tokens", "masked_index", "noise_keys", "masked_targets"):
            assert torch.equal(getattr(batch, name), getattr(masked["hidden"], name)), name
        assert batch.is_masked.flatten().nonzero().flatten().tolist() == batch.masked_index.tolist()
        assert torch.equal(batch.masked_tokens[~batch.is_masked], batch.tokens[~batch.is_masked])
    assert (masked["hidden"].masked_tokens[masked["hidden"].is_masked] == MASK_ID).all()
    assert torch.equal(masked["kept"].masked_tokens, masked["kept"].tokens)
    assert masked["shown"].masked_index.numel() > (masked["shown"].masked_tokens == MASK_ID).sum() > 0


def test_types(make_shard):
    batch = builder_of([make_shard([[40] * 5])], 42).build(rows_of([0, 1]), 100, draws_of(0, 1))
    types = {
        "tokens": torch.int64,
        "masked_tokens": torch.int64,
        "position_ids": torch.int64,
        "is_real": torch.bool,
        "masked_index": torch.int64,
        "noise_keys": torch.int32,
        "sample_lengths": torch.int32,
        "sample_ids": torch.int64,
    }
    assert {name: getattr(batch, name).dtype for name in types} == types
    moved = batch.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in types)
    assert (moved.is_packed, moved.max_seqlen) == (batch.is_packed, batch.max_seqlen)


def test_a_row_without_samples(make_shard):
    batch = builder_of([make_shard([[3]])], 5).build(rows_of([]), 8, draws_of(0))
    assert batch.tokens.tolist() == [[1] * 8]
    assert not batch.is_real.any()
    assert batch.masked_index.shape == (0,) and batch.noise_keys.shape == (0, 2)
    assert batch.masked_targets.shape == (0,)
    assert (batch.sample_lengths.tolist(), batch.sample_ids.tolist()) == ([0], [-1])
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 0], 0)


def test_samples_at_the_longest_length(make_shard):
    """Documents of 1, seq_length - 2 and seq_length - 1 content tokens."""
    builder = builder_of([make_shard([[1], [30], [31]])], seq_length=32, is_packed=False)
    batch = builder.build(rows_of([0], [1], [2], [3]), 32, draws_of(0, 1, 2, 3))
    assert batch.sample_lengths.tolist() == [3, 32, 32, 3]
    assert batch.tokens[1].tolist() == [0, *range(6, 36), 2]
    assert batch.tokens[2].tolist() == [0, *range(36, 66), 2]
    assert batch.tokens[3].tolist() == [0, 66, 2] + [1] * 29


@pytest.mark.parametrize("row_format", ["packed", "padded"])
@pytest.mark.parametrize(("dp_size", "stages", "vpp"), [(1, 1, 1), (2, 1, 1), (3, 4, 1), (2, 3, 2), (13, 3, 2)])
def test_every_rank_has_equally_many_micro_batches(row_format, dp_size, stages, vpp):
    lengths = np.random.default_rng(0).integers(3, 33, 41)
    data = DataConfig(row_format=row_format, seq_length=32, micro_batch_tokens=64, micro_batch_size=4)
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=vpp)
    rows = StepRows.of(lengths, RowRule(data, parallel, dp_size))
    count = len(rows.micro_batches)
    assert count % dp_size == 0 and (vpp == 1 or count >= stages * dp_size)
    assert {len(micro_batch) for micro_batch in rows.micro_batches} == {1 if row_format == "packed" else 4}
    held = np.concatenate([row for micro_batch in rows.micro_batches for row in micro_batch])
    assert sorted(held.tolist()) == list(range(41))
    places = sum(lengths[row].sum() <= rows.length for micro_batch in rows.micro_batches for row in micro_batch)
    assert rows.num_places == places * rows.length
    if row_format == "padded":
        assert rows.length == 32 and count == dp_size * max(-(-41 // (4 * dp_size)), stages if vpp > 1 else 1)
    else:
        assert all(len(row) for micro_batch in rows.micro_batches for row in micro_batch)
        assert rows.length <= 64
        assert count % (dp_size * stages) == 0 or count == 41 // dp_size * dp_size
