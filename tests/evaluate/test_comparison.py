"""Intervals hold what they promise, against simulations of seeds and items, and against scipy where it has the case."""

import numpy as np
import pytest
from scipy import stats

from metro_megatron.evaluate.comparison import POWER, difference, more_seeds, summary, variance_ratio

CAMPAIGNS = 2000
"""Standard error of a coverage of 95%: 0.5%."""


def tables(random, seeds: int, items: int, deviations, campaigns: int = CAMPAIGNS):
    """[campaigns, n, m] scores of mean 0 with these standard deviations of seed, item and what is left."""
    seed, item, left = deviations
    return (
        seed * random.standard_normal((campaigns, seeds, 1))
        + item * random.standard_normal((campaigns, 1, items))
        + left * random.standard_normal((campaigns, seeds, items))
    )


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("deviations", [(0.1, 0.3, 1.0), (0.3, 0.0, 1.0), (0.02, 1.0, 1.0), (0.1, 1.0, 0.5)])
def test_paired_intervals_cover_in_95_percent(seeds, deviations):
    random = np.random.default_rng(1)
    found = [difference(table) for table in tables(random, seeds, 100, deviations)]
    assert np.mean([not one.is_verdict for one in found]) == pytest.approx(0.95, abs=0.02)


def test_groups_of_one_arm_do_not_differ():
    """Two groups of seeds of the same arm, on the same items, whose own effects are far larger and cancel."""
    random = np.random.default_rng(2)
    a, b = np.split(tables(random, 10, 100, (0.2, 2.0, 1.0)), 2, axis=1)
    found = [difference(one, -other) for one, other in zip(a, b, strict=True)]
    assert np.mean([not one.is_verdict for one in found]) == pytest.approx(0.95, abs=0.02)


def test_the_seeds_part_is_the_t_interval_and_the_items_part_is_added():
    random = np.random.default_rng(3)
    table = tables(random, 5, 40, (1.0, 0.0, 0.5), 1)[0]
    table -= table.mean(axis=0)  # no item differs: the second part is nothing
    table += random.standard_normal((5, 1))
    found = difference(table)
    wanted = stats.ttest_1samp(table.mean(axis=1), 0).confidence_interval(0.95)
    assert found.item_variance == 0 and found.freedom == pytest.approx(4)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(wanted)
    welch = stats.ttest_ind(table[:3].mean(axis=1), table[3:].mean(axis=1), equal_var=False)
    other = difference(table[:3], -table[3:])
    seeds = sum(one.variance for one in other.seeds)
    assert other.mean / np.sqrt(seeds) == pytest.approx(welch.statistic)
    assert difference(table + np.arange(40)).item_variance == pytest.approx(np.var(np.arange(40), ddof=1) / 40, rel=0.1)


def test_an_arm_against_itself_is_exactly_zero():
    table = np.random.default_rng(4).standard_normal((5, 30))
    found = difference(table - table)
    assert (found.mean, found.half_width, found.is_verdict, more_seeds(found)) == (0, 0, False, None)


def test_common_random_numbers_narrow_the_interval_as_much_as_is_said():
    random = np.random.default_rng(5)
    common, a, b = random.standard_normal((3, 2000, 1)) + np.zeros((3, 2000, 2))
    assert variance_ratio(3 * common + a, 3 * common + b) == pytest.approx(1 / 10, rel=0.15)
    assert variance_ratio(a, b) == pytest.approx(1, rel=0.15)


def test_so_many_more_seeds_find_the_difference():
    random = np.random.default_rng(6)
    effect, deviations = 0.1, (0.1, 0.2, 1.0)
    many = difference(tables(random, 400, 200, deviations, 1)[0])
    found = many.with_seeds(4 / 400)  # the variances of 4 seeds, but known well
    found = type(found)(effect, tuple(type(one)(one.variance, 3) for one in found.seeds), found.items, found.left)
    needed = 4 + more_seeds(found)
    campaigns = effect + tables(random, needed, 200, deviations, 2000)
    assert np.mean([difference(one).is_verdict for one in campaigns]) == pytest.approx(POWER, abs=0.05)
    hopeless = difference(1e-4 + tables(random, 5, 20, (0.1, 1.0, 0.1), 1)[0])
    assert more_seeds(type(found)(1e-4, hopeless.seeds, hopeless.items, hopeless.left)) is None


def test_summary():
    median, spread, error = summary([1.0, 2.0, 6.0])
    assert (median, spread) == (2.0, 5.0) and error == pytest.approx(np.sqrt(7 / 3))
    assert np.isnan(summary([1.0])[2])
