import numpy as np

from metro_megatron.data.order import SampleOrder


def test_each_sample_once_per_epoch_in_another_order():
    order = SampleOrder(num_samples=101, seed=5)
    drawn = order[np.arange(3 * 101)]
    assert drawn.epoch.tolist() == [0] * 101 + [1] * 101 + [2] * 101
    epochs = drawn.sample.reshape(3, 101)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(101), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(epochs[0], SampleOrder(101, seed=6)[np.arange(101)].sample)


def test_any_slice_of_the_order_is_the_same_whatever_was_asked_before():
    order = SampleOrder(num_samples=7, seed=1)
    whole = order[np.arange(1000)]
    for first, length in ((0, 3), (5, 4), (6, 30), (993, 7)):
        part = order[np.arange(first, first + length)]
        assert np.array_equal(part.sample, whole.sample[first : first + length])
        assert np.array_equal(part.epoch, whole.epoch[first : first + length])


def test_one_sample_and_positions_beyond_32_bits():
    assert SampleOrder(1, 3)[np.arange(4)].sample.tolist() == [0, 0, 0, 0]
    far = SampleOrder(200_000_000, 3)[np.array([10**15, 10**15 + 1])]
    assert far.epoch.tolist() == [5_000_000, 5_000_000]
    assert np.all((far.sample >= 0) & (far.sample < 200_000_000))


def test_draws_are_indexed_by_place():
    drawn = SampleOrder(10, 1)[np.arange(20)]
    some = drawn[np.array([19, 0])]
    assert len(some) == 2
    assert some.epoch.tolist() == [1, 0]
    assert some.sample.tolist() == [drawn.sample[19], drawn.sample[0]]
