import numpy as np

from metro_megatron.data.blending import Blend
from metro_megatron.data.order import SampleOrder


def order_of(num_samples: int, seed: int) -> SampleOrder:
    return SampleOrder((0, num_samples), Blend((num_samples,)), seed)


def test_each_sample_once_per_epoch_in_another_order():
    order = order_of(num_samples=101, seed=5)
    drawn = order[np.arange(3 * 101)]
    assert drawn.epoch.tolist() == [0] * 101 + [1] * 101 + [2] * 101
    epochs = drawn.sample.reshape(3, 101)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(101), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(epochs[0], order_of(101, seed=6)[np.arange(101)].sample)


def test_any_slice_of_the_order_is_the_same_whatever_was_asked_before():
    order = order_of(num_samples=7, seed=1)
    whole = order[np.arange(1000)]
    for first, length in ((0, 3), (5, 4), (6, 30), (993, 7)):
        part = order[np.arange(first, first + length)]
        assert np.array_equal(part.sample, whole.sample[first : first + length])
        assert np.array_equal(part.epoch, whole.epoch[first : first + length])


def test_one_sample_and_positions_beyond_32_bits():
    assert order_of(1, 3)[np.arange(4)].sample.tolist() == [0, 0, 0, 0]
    far = order_of(200_000_000, 3)[np.array([10**15, 10**15 + 1])]
    assert far.epoch.tolist() == [5_000_000, 5_000_000]
    assert np.all((far.sample >= 0) & (far.sample < 200_000_000))


def test_draws_are_indexed_by_place():
    drawn = order_of(10, 1)[np.arange(20)]
    some = drawn[np.array([19, 0])]
    assert len(some) == 2
    assert some.epoch.tolist() == [1, 0]
    assert some.sample.tolist() == [drawn.sample[19], drawn.sample[0]]


def test_sources_alternate_and_run_their_own_epochs():
    order = SampleOrder((0, 5, 8), Blend((1, 3)), seed=2)
    drawn = order[np.arange(40)]
    is_first = drawn.sample < 5
    assert is_first.sum() == 10
    assert drawn.epoch[is_first].tolist() == [0] * 5 + [1] * 5
    assert drawn.epoch[~is_first].tolist() == [epoch for epoch in range(10) for _ in range(3)]
    for epoch in range(10):
        of_epoch = drawn.sample[~is_first & (drawn.epoch == epoch)]
        assert sorted(of_epoch.tolist()) == [5, 6, 7]
