import dataclasses
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from metro_megatron.config.schema import Config, DataConfig, TrainConfig
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import build_sample_index
from metro_megatron.errors import UserError

SEQ_LENGTH = 64


@pytest.fixture
def shards(make_shard, lognormal_documents):
    return [make_shard(lognormal_documents(60, median=60, seed=number), number) for number in range(2)]


def config_of(global_batch_size=32, seed=1, **data):
    data = {"seq_length": SEQ_LENGTH, "micro_batch_tokens": 256, "micro_batch_size": 8, **data}
    return Config(data=DataConfig(**data), train=TrainConfig(seed=seed, global_batch_size=global_batch_size))


def data_of(shards, config=None, **options):
    config = config or config_of()
    return PretrainingData(build_sample_index(shards, config.data.seq_length), shards, config, **options)


def batch_of(data, step):
    return data.step_batch(step, step * data._config.train.global_batch_size)


def contents(step_batches):
    """Multiset of (sample id, tokens, masked tokens, noise keys of the masked positions) of some ranks."""
    found = Counter()
    for step_batch in step_batches:
        for batch in step_batch.micro_batches:
            rows, length = batch.tokens.shape
            place = {cell: number for number, cell in enumerate(batch.masked_index.tolist())}
            row, begin = 0, 0
            for sample_id, size in zip(batch.sample_ids.tolist(), batch.sample_lengths.tolist(), strict=True):
                if rows == 1:
                    here, cells = 0, range(begin, begin + size)
                    begin += size
                else:
                    here, cells = row, range(size)
                    row += 1
                if sample_id == -1:
                    continue
                span = slice(cells.start, cells.stop)
                places = [place.pop(s * rows + here) for s in cells if s * rows + here in place]
                assert batch.is_real[here, span].all()
                assert batch.position_ids[here, span].tolist() == list(range(size))
                found[
                    sample_id,
                    tuple(batch.tokens[here, span].tolist()),
                    tuple(batch.masked_tokens[here, span].tolist()),
                    str(batch.noise_keys[places].tolist()),
                ] += 1
            assert not place
            assert int(batch.is_real.sum()) == int(batch.sample_lengths.sum())
    return found


def test_every_layout_holds_the_same_samples_masks_and_noise(shards):
    """Packed and padded, 1 to 4 ranks, several sizes of micro batches, over a step that crosses an epoch."""
    reference = data_of(shards)
    for step in (0, reference.num_samples // 32):
        alone = batch_of(reference, step)
        expected = contents([alone])
        assert sum(expected.values()) == 32
        assert alone.num_tokens == sum(len(tokens) * n for (_, tokens, _, _), n in expected.items())
        assert alone.num_squares == sum(len(tokens) ** 2 * n for (_, tokens, _, _), n in expected.items())
        masked = sum(sum(id == 4 for id in masked) * n for (_, _, masked, _), n in expected.items())
        assert alone.num_masked == masked > 0
        for dp_size in (1, 2, 3, 4):
            for data in (
                {"micro_batch_tokens": 64},
                {"micro_batch_tokens": 1000},
                {"row_format": "padded"},
                {"row_format": "padded", "micro_batch_size": 1},
                {"row_format": "padded", "micro_batch_size": 3},
            ):
                ranks = [data_of(shards, config_of(**data), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
                batches = [batch_of(rank, step) for rank in ranks]
                assert contents(batches) == expected
                assert {(b.step, b.num_tokens, b.num_masked) for b in batches} == {
                    (step, alone.num_tokens, alone.num_masked)
                }
                assert len({len(b.micro_batches) for b in batches}) == 1


def test_tokens_are_the_shards_and_only_content_is_masked(shards):
    data = data_of(shards)
    index = build_sample_index(shards, SEQ_LENGTH)
    for sample_id, tokens, masked, _ in contents([batch_of(data, 0)]):
        shard, start, length = index.shard[sample_id], index.start[sample_id], index.length[sample_id]
        stream = shards[shard].tokens[start : start + length]
        assert tokens == (0, *stream.tolist(), 2)
        assert all(new in (old, 4) for old, new in zip(tokens, masked, strict=True))
        assert (masked[0], masked[-1]) == (0, 2)


def ids_of(step_batches):
    ids = torch.cat([batch.sample_ids for step in step_batches for batch in step.micro_batches])
    return ids[ids >= 0].tolist()


def test_each_sample_exactly_once_per_epoch_and_new_masks_in_the_next(make_shard):
    shard = make_shard([[50]] * 48)
    data = data_of([shard], config_of(global_batch_size=16))
    assert (data.num_samples, build_sample_index([shard], SEQ_LENGTH).num_tokens) == (48, 48 * 52)
    epochs = [[batch_of(data, step) for step in range(3 * epoch, 3 * epoch + 3)] for epoch in range(2)]
    assert sorted(ids_of(epochs[0])) == sorted(ids_of(epochs[1])) == list(range(48))
    assert ids_of(epochs[0]) != ids_of(epochs[1])
    assert not contents(epochs[0]).keys() & contents(epochs[1]).keys()


def test_a_batch_larger_than_the_data_holds_samples_of_several_epochs(make_shard):
    shard = make_shard([[50]] * 5)
    data = data_of([shard], config_of(global_batch_size=12))
    assert sorted(Counter(ids_of([batch_of(data, 0)])).values()) == [2, 2, 2, 3, 3]
    assert max(contents([batch_of(data, 0)]).values()) == 1


def test_one_token_documents(make_shard):
    data = data_of([make_shard([[1]] * 100)], config_of(global_batch_size=100))
    batch = batch_of(data, 0)
    assert batch.num_tokens == 300
    assert 20 < batch.num_masked < 70  # 45 expected: floor(0.45 + u) of 3 tokens
    assert sum(len(micro_batch.masked_index) for micro_batch in batch.micro_batches) == batch.num_masked


def test_evaluation_covers_the_first_samples_once_and_always_alike(shards):
    data = data_of(shards, split="validation", dp_rank=0)
    batches = list(data.evaluation_batches(num_samples=50, batch_size=20))
    assert [batch.step for batch in batches] == [0, 1, 2]
    assert [len(ids_of([batch])) for batch in batches] == [20, 20, 10]
    assert len(set(ids_of(batches))) == 50
    assert max(ids_of(batches)) > data.num_samples // 2  # not the head of the first shard
    assert contents(data.evaluation_batches(50, 20)) == contents(batches)
    assert contents(data.evaluation_batches(50, 7)) == contents(batches)
    ranks = [data_of(shards, split="validation", dp_rank=rank, dp_size=4) for rank in range(4)]
    per_rank = [list(rank.evaluation_batches(50, 20)) for rank in ranks]
    assert contents(batch for rank in per_rank for batch in rank) == contents(batches)
    assert {batch.num_masked for batch in batches} == {batch.num_masked for batch in per_rank[3]}


def test_evaluation_of_every_sample_of_a_small_set(make_shard):
    data = data_of([make_shard([[5], [7], [9]])], split="validation")
    (batch,) = data.evaluation_batches(min(2048, data.num_samples), batch_size=32)
    assert sorted(ids_of([batch])) == [0, 1, 2]
    with pytest.raises(AssertionError):
        list(data.evaluation_batches(4, 32))


def test_validation_has_masks_and_noise_of_its_own(shards):
    whole = [data_of(shards, config_of(100), split=split) for split in ("train", "validation")]
    masks = [contents([batch_of(data, step) for step in range(2)]) for data in whole]
    long = [{key for key in found if len(key[1]) > 40} for found in masks]
    assert long[0] and long[1] and not long[0] & long[1]


def assert_equal(one, other):
    assert (one.step, one.num_masked, one.num_tokens) == (other.step, other.num_masked, other.num_tokens)
    assert one.end == other.end
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        for field in dataclasses.fields(a):
            one, other = (getattr(batch, field.name) for batch in (a, b))
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def token_config(tokens=2048, **data):
    config = config_of(0, **data)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_tokens=tokens))


def steps_of(data, count):
    """Batches of the first steps, each beginning where the one before ended."""
    batches, first = [], 0
    for step in range(count):
        batches.append(data.step_batch(step, first))
        first = batches[-1].end
    return batches


def test_batches_of_tokens_end_before_the_sample_that_is_too_much(shards):
    """Whatever the rows and ranks: the same samples, the most that have train.global_batch_tokens at most."""
    alone = steps_of(data_of(shards, token_config()), 6)
    order, index = data_of(shards)._samples.phases[0].order, build_sample_index(shards, SEQ_LENGTH)
    drawn = order[np.arange(alone[-1].end + 1)].sample
    lengths = index.length[drawn] + 2
    begin = 0
    for batch in alone:
        assert batch.num_tokens == lengths[begin : batch.end].sum() <= 2048
        assert batch.num_tokens + lengths[batch.end] > 2048 and batch.num_samples == batch.end - begin
        begin = batch.end
    assert sorted(ids_of(alone)) == sorted(drawn[:begin].tolist()) != ids_of(alone)
    for dp_size in (1, 2, 3):
        for data in ({"micro_batch_tokens": 99}, {"row_format": "padded", "micro_batch_size": 2}):
            ranks = [data_of(shards, token_config(**data), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
            for step, batches in enumerate(zip(*(steps_of(rank, 6) for rank in ranks), strict=True)):
                assert contents(batches) == contents([alone[step]])
                facts = {(batch.num_tokens, batch.num_masked, batch.end) for batch in batches}
                assert facts == {(alone[step].num_tokens, alone[step].num_masked, alone[step].end)}
                assert len({len(batch.micro_batches) for batch in batches}) == 1


def test_micro_batches_of_a_step_are_of_one_length_that_fits_its_samples(make_shard, lognormal_documents):
    """Rows of at most 16,384 on 8 ranks: as many on each, none empty, a handful of shapes, measured 0.3% of padding."""
    shard = make_shard(lognormal_documents(1500))
    for config in (
        config_of(2048, seq_length=512, micro_batch_tokens=16384),
        token_config(1 << 20, seq_length=512, micro_batch_tokens=16384),
    ):
        ranks = [data_of([shard], config, dp_rank=rank, dp_size=8) for rank in range(8)]
        shapes = set()
        for step, batches in enumerate(zip(*(steps_of(rank, 3) for rank in ranks), strict=True)):
            micro_batches = [one for batch in batches for one in batch.micro_batches]
            shape = {(len(batch.micro_batches), one.tokens.shape) for batch in batches for one in batch.micro_batches}
            assert len(shape) == 1 and all(one.sample_lengths.min() > 0 for one in micro_batches), step
            assert batches[0].num_tokens > 0.99 * sum(one.tokens.numel() for one in micro_batches)
            shapes |= shape
        assert all(length <= 16384 and length % 16 == 0 for _, (_, length) in shapes)


def test_weights_choose_the_sources(shards):
    config = config_of(30)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, weights=[2.0, 1.0]))
    data = data_of(shards, config)
    first_source = build_sample_index(shards, SEQ_LENGTH).source_bounds[1]
    for step in range(3):
        ids = np.array(ids_of([batch_of(data, step)]))
        assert (ids < first_source).sum() == 20
    with pytest.raises(UserError, match="has 2 numbers for 1 datasets"):
        data_of(shards[:1], config)


@pytest.mark.parametrize("config", [config_of(), token_config()], ids=["samples", "tokens"])
@pytest.mark.parametrize("prefetch_steps", [0, 1, 3, 20])
def test_prefetch_is_step_batch_from_any_step(shards, prefetch_steps, config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch_steps=prefetch_steps))
    data = data_of(shards, config)
    expected = steps_of(data, 12)
    fetched = list(data.prefetch(5, 12, expected[4].end))
    assert [batch.step for batch in fetched] == list(range(5, 12))
    for batch, other in zip(fetched, expected[5:], strict=True):
        assert_equal(batch, other)
    assert list(data.prefetch(5, 5, 0)) == []


def test_prefetch_stays_within_its_bound_and_ends_when_closed(shards, monkeypatch):
    data = data_of(shards, config_of(prefetch_steps=2))
    prepared = []
    original = PretrainingData.step_batch

    def step_batch(self, step, first):
        prepared.append((step, threading.current_thread().name))
        return original(self, step, first)

    monkeypatch.setattr(PretrainingData, "step_batch", step_batch)
    batches = data.prefetch(0, 100, 0)
    assert [next(batches).step for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert 3 <= len(prepared) <= 5
    assert {name for _, name in prepared} == {"prefetch_0"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_raises_the_error_at_its_step(shards, monkeypatch):
    data = data_of(shards, config_of(prefetch_steps=3))
    original = PretrainingData.step_batch

    def step_batch(self, step, first):
        if step == 2:
            raise OSError("the disk is gone")
        return original(self, step, first)

    monkeypatch.setattr(PretrainingData, "step_batch", step_batch)
    batches = data.prefetch(0, 10, 0)
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_sample_must_fit_into_a_packed_row(shards):
    with pytest.raises(UserError, match="data.micro_batch_tokens is 63, less than .* data.seq_length 64"):
        data_of(shards, config_of(micro_batch_tokens=63))
    data_of(shards, config_of(micro_batch_tokens=63, row_format="padded"))


@pytest.mark.parametrize(
    "data",
    [
        {"micro_batch_tokens": 512},
        {"micro_batch_tokens": 16384},
        {"row_format": "padded", "micro_batch_size": 1},
        {"row_format": "padded", "micro_batch_size": 32},
    ],
    ids=str,
)
def test_throughput(make_shard, lognormal_documents, data):
    """Printed, not required: tokens per processor second, 2048 samples of mean length 340 a step.

    Measured on one core of a virtual machine, in millions: packed 1.8 (rows of 512) and 21 (16384), padded
    1.2 (1 row) and 12 (32 rows).
    """
    shard = make_shard(lognormal_documents(1500))
    loader = data_of([shard], config_of(2048, seq_length=512, **data))
    batch_of(loader, 0)
    begin = time.process_time()
    num_tokens = sum(batch_of(loader, step).num_tokens for step in range(1, 4))
    rate = num_tokens / (time.process_time() - begin)
    print(f"{data}: {rate / 1e6:.1f} million tokens/s")
    assert np.isfinite(rate)
