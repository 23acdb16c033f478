import numpy as np
import pytest

from metro_megatron.data.packing import pack
from metro_megatron.data.samples import build_sample_index


def best_fit_decreasing_ref(lengths, capacity):
    rows = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        room = [capacity - sum(lengths[p] for p in row) for row in rows]
        fitting = [(left, number) for number, left in enumerate(room) if left >= lengths[place]]
        if fitting:
            rows[min(fitting)[1]].append(place)
        else:
            rows.append([place])
    return [sorted(row) for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_equals_best_fit_decreasing_by_definition(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, rng.integers(1, 200))
    for capacity in (59, 100, 1000):
        rows = pack(lengths, capacity)
        assert [row.tolist() for row in rows] == best_fit_decreasing_ref(lengths.tolist(), capacity)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= capacity for row in rows)


def test_hand_made_rows():
    assert [row.tolist() for row in pack([3, 7, 5, 5, 2, 8], 10)] == [[4, 5], [0, 1], [2, 3]]
    assert [row.tolist() for row in pack([10, 10], 10)] == [[0], [1]]
    assert [row.tolist() for row in pack([1, 1, 1], 10)] == [[0, 1, 2]]
    assert pack([], 10) == []


def test_a_sample_longer_than_a_row_is_our_bug():
    with pytest.raises(AssertionError):
        pack([11], 10)


@pytest.mark.parametrize(("capacity", "largest_waste"), [(512, 0.03), (2048, 0.006), (16384, 0.0005)])
def test_rows_are_full_on_a_realistic_mix(make_shard, lognormal_documents, capacity, largest_waste):
    """Wikipedia's assumed lengths (mean sample 340 tokens), 2048 samples a step, mean of 3 steps.

    Share of empty places in all rows but the last of a step, which holds what is left over; rows over the
    fewest that could hold the tokens.

    Measured: 1.87% and 1.019 at 512, 0.12% and 1.002 at 2048, 0.002% and 1.000 at 16384.
    """
    lengths = build_sample_index([make_shard(lognormal_documents(1500))], 512).length + 2
    wastes, overheads = [], []
    for step in range(3):
        of_step = np.random.default_rng(step).choice(lengths, 2048)
        rows = pack(of_step, capacity)
        wastes.append(1 - of_step[np.concatenate(rows[:-1])].sum() / (capacity * (len(rows) - 1)))
        overheads.append(len(rows) / np.ceil(of_step.sum() / capacity))
    print(f"capacity {capacity}: waste {np.mean(wastes):.3%}, rows {np.mean(overheads):.3f} of the fewest")
    assert max(wastes) < largest_waste
