"""Histograms of lengths."""

import json

import numpy as np

from metro_megatron.preprocess.statistics import EDGES, LengthHistogram


def test_bins_are_powers_of_the_root_of_two():
    assert EDGES[:12].tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 23, 32, 46, 64]
    assert EDGES[-1] == 1 << 31


def test_counts_sums_and_json():
    lengths = np.random.default_rng(1).integers(1, 10_000, 5000)
    histogram = LengthHistogram.from_lengths(lengths)
    expected, _ = np.histogram(lengths, bins=[*EDGES, 1 << 40])
    assert histogram.counts.tolist() == expected.tolist() and histogram.total == 5000
    assert LengthHistogram.from_lengths(lengths[:100]) + LengthHistogram.from_lengths(lengths[100:]) == histogram
    assert LengthHistogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram
    assert LengthHistogram.from_lengths([]) == LengthHistogram() and LengthHistogram().to_json() == {}
    assert LengthHistogram.from_lengths([1, 7, 8]).to_json() == {"1": 1, "6": 1, "8": 1}
