import numpy as np
import pytest

from metro_megatron.randomness import Permutation, Purpose, extend64, hash64, uniform


def test_hash_is_chained_splitmix64_and_never_changes():
    # The first output of splitmix64 seeded with 0; then values of the same chain in plain Python.
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(1)) == 0x910A2DEC89025CC1
    assert int(hash64(1, 2, 3)) == 0xD0734750FDE362B3
    assert int(hash64(-1)) == int(hash64(2**64 - 1)) == 0xE4D971771B652C20
    expected = [0x5E41AB087439611E, 0xE9FD6049D65AF21E, 0xBCD9DBB49673066B]
    assert hash64(1, np.arange(3)).tolist() == expected


def test_purposes_never_change():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ORDER": 1,
        "COUNT": 2,
        "MASK": 3,
        "SAMPLE": 4,
        "INIT": 5,
        "DROPOUT": 6,
        "VALIDATION": 7,
        "SPLIT": 8,
        "READ": 9,
        "CROP": 10,
    }


def test_scalars_arrays_and_broadcasting_agree():
    rows, columns = np.array([-3, 0, 2**40])[:, None], np.arange(4, dtype=np.int32)[None, :]
    table = hash64(7, Purpose.MASK, rows, columns)
    assert table.dtype == np.uint64 and table.shape == (3, 4)
    scalars = [[int(hash64(7, Purpose.MASK, int(r), int(c))) for c in columns[0]] for r in rows[:, 0]]
    assert table.tolist() == scalars
    assert np.array_equal(extend64(hash64(7, Purpose.MASK, rows), columns), table)
    assert isinstance(hash64(1, np.int64(2)), np.uint64)
    assert uniform(7, 8) == uniform(7, np.array([8]))[0]


def test_arguments_are_not_written_to():
    words = np.arange(5, dtype=np.uint64)
    hash64(words, 3)
    hash64(words)
    assert words.tolist() == [0, 1, 2, 3, 4]


def test_neighboring_coordinates_give_independent_uniform_numbers():
    numbers = uniform(1, np.arange(400)[:, None], np.arange(1000)[None, :])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.bincount((numbers.ravel() * 100).astype(int), minlength=100)
    chi_square = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_square < 160  # 99 degrees of freedom: exceeded with probability 1e-4
    for shifted in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.0021  # 6 standard deviations


def test_every_bit_of_a_word_changes_half_of_the_hash():
    words = np.arange(512, dtype=np.uint64)
    for bit in range(64):
        changed = hash64(9, words) ^ hash64(9, words ^ np.uint64(1 << bit))
        assert abs(np.bitwise_count(changed).mean() - 32) < 1.1  # 6 standard deviations


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**20 + 7])
def test_permutation_is_a_bijection(size):
    permutation = Permutation(size, 3, Purpose.ORDER, 0)
    images = permutation[np.arange(size)]
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))
    some = np.array([[0, size - 1], [size // 2, 0]])
    assert np.array_equal(permutation[some], images[some])


def test_permutation_depends_on_its_key_and_never_changes():
    images = [Permutation(1000, 1, epoch)[np.arange(1000)] for epoch in range(3)]
    assert images[0][:8].tolist() == [928, 463, 178, 535, 968, 13, 48, 89]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (images[one] == images[other]).sum() < 10  # 1 expected
        assert abs(np.corrcoef(images[one], images[other])[0, 1]) < 0.2


def test_all_orders_of_three_are_equally_likely():
    orders = np.stack([Permutation(3, seed)[np.arange(3)] for seed in range(6000)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25.8  # 5 degrees of freedom: probability 1e-4


def test_an_index_outside_is_our_bug():
    for indices in ([10], [-1]):
        with pytest.raises(AssertionError):
            Permutation(10, 1)[np.array(indices)]
    assert Permutation(10, 1)[np.array([], dtype=np.int64)].shape == (0,)
