"""Intervals hold what they promise, against simulations of seeds and items, and against scipy where it has the case."""

import numpy as np
import pytest
from scipy import stats

from metro_megatron.evaluate.comparison import (
    CONFIDENCE,
    POWER,
    Component,
    Difference,
    difference,
    more_seeds,
    quantile,
    summary,
    variance_ratio,
)

CAMPAIGNS = 2000
"""Standard error of a coverage of 95%: 0.5%."""
RATIOS = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16, 64])
"""What seeds are of the variance, over what items are."""


def tables(random, seeds: int, items: int, deviations, campaigns: int = CAMPAIGNS):
    """[campaigns, n, m] scores of mean 0 with these standard deviations of seed, item and what is left."""
    seed, item, left = deviations
    return (
        seed * random.standard_normal((campaigns, seeds, 1))
        + item * random.standard_normal((campaigns, 1, items))
        + left * random.standard_normal((campaigns, seeds, items))
    )


@pytest.mark.parametrize("arms", [(1,), (1, 1), (16, 1)], ids=["paired", "unpaired", "one_varies_more"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_in_95_percent_whether_seeds_prevail_or_items(seeds, arms):
    """Mean squares of many campaigns at once, of tables without the scores."""
    random, shape = np.random.default_rng(1), (8000, len(RATIOS))

    def estimated(variance, freedom: int):
        return variance * random.chisquare(freedom, shape) / freedom

    for items in (20, 1000):
        for left in (0, 0.5):  # of each table, over the items' part
            variances = [np.maximum(RATIOS * arm / sum(arms), left) for arm in arms]
            between = [Component(estimated(one, seeds - 1), seeds - 1) for one in variances]
            lefts = [estimated(left, (seeds - 1) * (items - 1)) for _ in arms]
            other = Component(np.maximum(0, estimated(1 + left * len(arms), items - 1) - sum(lefts)), items - 1)
            error = np.sqrt(sum(one.variance for one in between) + other.variance)
            mean = random.standard_normal(shape) * np.sqrt(1 + sum(variances))
            covers = np.abs(mean) <= quantile((1 + CONFIDENCE) / 2, between, other) * error
            share = covers.mean(axis=0)
            assert (np.abs(share - 0.95) < 0.026).all(), (items, left, share)  # 0.02, and 2.5 standard errors


def test_intervals_of_scores_cover():
    random = np.random.default_rng(1)
    found = [difference(table) for table in tables(random, 3, 100, (0.1, 0.3, 1.0))]
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
    assert found.item_variance == 0
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


@pytest.mark.parametrize("groups", [(4,), (5, 5), (2, 8)])
def test_so_many_more_seeds_in_each_arm_find_the_difference(groups):
    random = np.random.default_rng(6)
    effect, deviations = (0.1, (0.1, 0.2, 1.0)) if len(groups) == 1 else (0.12, (0.1, 0.0, 1.0))
    seed, item, left = np.square(deviations)
    known = Difference(
        effect,
        tuple(Component((seed + left / 200) / n, n - 1) for n in groups),
        Component(item / 200 + sum(left / 200 / n for n in groups), 199),
        tuple(left / 200 / n for n in groups),
    )
    more = more_seeds(known)
    many = [tables(random, n + more, 200, deviations) for n in groups]
    many[0] += effect
    assert np.mean([difference(*one).is_verdict for one in zip(*many, strict=True)]) == pytest.approx(POWER, abs=0.03)


def test_no_seeds_are_enough_where_items_are_too_few():
    few = difference(tables(np.random.default_rng(6), 5, 20, (0.1, 1.0, 0.1), 1)[0])
    assert more_seeds(Difference(1e-4, few.seeds, few.items, few.left)) is None


def test_summary():
    median, spread, error = summary([1.0, 2.0, 6.0])
    assert (median, spread) == (2.0, 5.0) and error == pytest.approx(np.sqrt(7 / 3))
    assert np.isnan(summary([1.0])[2])
