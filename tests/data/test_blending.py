"""Proportions of sources are exact at every prefix, and positions say it all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_megatron.data.blending import Blend, source_weights
from metro_megatron.errors import UserError


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
def test_shares_of_every_prefix(weights: list[int]) -> None:
    total = sum(weights)
    source, place = Blend(tuple(weights)).draw(np.arange(2 * total + 7))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    share = np.arange(1, len(source) + 1)[:, None] * np.array(weights) / total
    assert np.abs(counts - share).max() < max(1, sum(weight > 0 for weight in weights) - 1) + 1e-9
    assert counts[total - 1].tolist() == weights and counts[2 * total - 1].tolist() == [
        2 * weight for weight in weights
    ]
    assert place.tolist() == (counts[np.arange(len(source)), source] - 1).tolist()


def test_positions_far_out_and_large_weights() -> None:
    weights = (1_000_000_007, 3, 998_244_353)
    blend = Blend(weights)
    total = sum(weights)
    for first in (0, 10**15 // total * total):
        source, place = blend.draw(np.arange(first, first + 1000))
        again, place_again = blend.draw([first + 999, first])
        assert again.tolist() == [source[999], source[0]] and place_again.tolist() == [place[999], place[0]]
        assert np.array_equal(np.diff(place[source == 0]), np.ones((source == 0).sum() - 1))
    assert blend.draw([total * 10**6])[1].tolist() in ([weight * 10**6] for weight in weights)


def test_more_samples_than_31_bits_count() -> None:
    """As exact integers say."""
    for weights in ((2**31, 3, 2**33 + 1), (2**40 - 1, 2**40 - 7), (1, 2**41 - 3)):
        total = sum(weights)
        places = [0, 1, total // 3, total - 1, total, 5 * total + total // 7, 10**6 * total - 1]
        blend = Blend(weights)
        source, before = blend.draw(places)
        for place, number, count in zip(places, source.tolist(), before.tolist(), strict=True):
            counts = [blend.counts(place + step) for step in (0, 1)]
            assert [now - then for then, now in zip(*counts, strict=True)] == np.eye(len(weights))[number].tolist()
            assert counts[0][number] == count


def test_weights() -> None:
    assert source_weights([], [5, 0, 7]) == (5, 0, 7)
    one, two, three = source_weights([0.1, 0.2, 0.7], [5, 9, 7])
    assert abs(two / one - 2) < 1e-5 and abs(three / one - 7) < 1e-5
    assert source_weights([1e-12, 1.0], [1, 1])[0] == 1
    assert source_weights([1e308, 1.5e308], [1, 1]) == source_weights([2, 3], [1, 1])
    with pytest.raises(UserError) as refused:
        source_weights([0.5, -1.0, float("nan")], [5, 0])
    assert len(refused.value.problems) == 4
