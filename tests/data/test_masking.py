import numpy as np
import pytest

from metro_megatron.data.masking import Masking
from metro_megatron.data.order import Draws
from metro_megatron.randomness import hash64

MASKING = Masking(seed=1, probability=0.15)


def draws_of(num_samples, epoch=0):
    return Draws(np.full(num_samples, epoch, dtype=np.int64), np.arange(num_samples, dtype=np.int64))


def test_count_at_512_tokens_is_76_or_77():
    """recipe: floor(0.15 * 512 + u) = floor(76.8 + u)."""
    counts = MASKING.counts(draws_of(100_000), np.full(100_000, 510))
    assert sorted(set(counts.tolist())) == [76, 77]
    assert abs((counts == 77).mean() - 0.8) < 0.0076  # 6 standard deviations


@pytest.mark.parametrize("length", [1, 2, 3, 8, 18, 98, 509])
def test_mean_count_is_exactly_the_probability(length):
    wanted = 0.15 * (length + 2)
    counts = MASKING.counts(draws_of(100_000), np.full(100_000, length))
    assert set(counts.tolist()) <= {int(wanted), int(wanted) + 1}
    assert abs(counts.mean() - wanted) < 6 * 0.5 / np.sqrt(100_000)


def test_count_never_exceeds_the_content():
    counts = Masking(1, 0.9).counts(draws_of(1000), np.full(1000, 1))
    assert set(counts.tolist()) == {1}
    assert Masking(1, 0.0).counts(draws_of(1000), np.full(1000, 510)).sum() == 0


def test_positions_are_the_smallest_hashes_of_the_content():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    draws = draws_of(300, epoch=2)
    place, position = MASKING.positions(draws, lengths)
    counts = MASKING.counts(draws, lengths)
    expected = []
    for sample, length in enumerate(lengths.tolist()):
        by_hash = sorted(range(1, length + 1), key=lambda p: int(hash64(1, 3, 2, sample, p)))
        expected += [(sample, p) for p in sorted(by_hash[: counts[sample]])]
    assert list(zip(place.tolist(), position.tolist(), strict=True)) == expected


def test_specials_are_never_masked_and_content_is_masked_evenly():
    lengths = np.full(20_000, 18)
    _, position = MASKING.positions(draws_of(20_000), lengths)
    hits = np.bincount(position, minlength=20)
    assert hits[0] == hits[19] == 0
    assert abs(hits[1:19] / 20_000 - 3 / 18).max() < 6 * np.sqrt(1 / 6 * 5 / 6 / 20_000)


def test_masks_do_not_depend_on_the_samples_around():
    lengths = np.random.default_rng(1).integers(1, 511, 400)
    draws = draws_of(400)
    place, position = MASKING.positions(draws, lengths)
    keys = MASKING.noise_keys(draws[place], position)
    chosen = np.random.default_rng(2).permutation(400)[:37]
    some_place, some_position = MASKING.positions(draws[chosen], lengths[chosen])
    some_keys = MASKING.noise_keys(draws[chosen][some_place], some_position)
    for number, sample in enumerate(chosen):
        assert np.array_equal(some_position[some_place == number], position[place == sample])
        assert np.array_equal(some_keys[some_place == number], keys[place == sample])


def test_masks_change_with_epoch_and_seed():
    lengths = np.full(50, 510)
    positions = [
        MASKING.positions(draws_of(50), lengths)[1],
        MASKING.positions(draws_of(50, epoch=1), lengths)[1],
        Masking(2, 0.15).positions(draws_of(50), lengths)[1],
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        shared = len(set(positions[one][:76].tolist()) & set(positions[other][:76].tolist()))
        assert shared < 30  # 11 expected


def test_noise_keys_are_the_halves_of_the_hash():
    draws = Draws(np.array([0, 3]), np.array([5, 7]))
    keys = MASKING.noise_keys(draws, np.array([2, 510]))
    assert keys.dtype == np.int32 and keys.shape == (2, 2)
    halves = keys.view(np.uint32).astype(object)
    expected = [int(hash64(1, 4, 0, 5, 2)), int(hash64(1, 4, 3, 7, 510))]
    assert [int(high) << 32 | int(low) for high, low in halves] == expected


def test_no_samples():
    place, position = MASKING.positions(draws_of(0), np.empty(0, np.int32))
    assert place.shape == position.shape == (0,)
    assert MASKING.noise_keys(draws_of(0), position).shape == (0, 2)
