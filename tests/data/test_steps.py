"""Which samples a step has; that batches hold them is tests/data/test_loader.py's."""

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from metro_megatron.config.schema import Config
from metro_megatron.data.samples import SampleIndex
from metro_megatron.data.steps import StepSamples


def index_of(lengths: np.ndarray, *bounds: int) -> SampleIndex:
    """An index of samples that lie nowhere."""
    content = int(lengths.sum(dtype=np.int64))
    return SampleIndex(np.zeros(0, np.int16), np.zeros(0, np.int64), lengths, (0, *bounds, len(lengths)), content, 512)


def test_steps_end_before_the_sample_that_is_too_much() -> None:
    index = index_of(np.random.default_rng(0).integers(20, 511, 5000).astype(np.int32), 1200)
    config = replace(Config(), train=replace(Config().train, global_batch_tokens=20_000))
    samples = StepSamples(index, config)
    for (step, first), (after, end) in zip(samples.starts(0, 0), islice(samples.starts(0, 0), 1, 60), strict=False):
        lengths = samples.lengths(samples.draws(first, end + 1 - first))
        assert after == step + 1 and lengths[:-1].sum() <= 20_000 < lengths.sum()
        assert samples.count(first) == end - first
    of_samples = StepSamples(index, replace(config, train=replace(config.train, global_batch_size=7)))
    assert list(islice(of_samples.starts(3, 21), 3)) == [(3, 21), (4, 28), (5, 35)]


def test_held_out_samples_have_an_order_of_their_own() -> None:
    index, config = index_of(np.full(300, 30, np.int32)), Config()
    orders = [StepSamples(index, config, split).draws(0, 300).sample for split in ("train", "validation")]
    assert (orders[0] != orders[1]).any() and all((np.sort(order) == np.arange(300)).all() for order in orders)


@pytest.mark.long
def test_the_steps_between_two_log_lines_are_counted_in_under_a_second() -> None:
    """At the default batch of a million tokens, of 20 million samples."""
    index = index_of(np.random.default_rng(0).integers(20, 511, 20_000_000).astype(np.int32), 7_000_000)
    config = Config()
    starts = StepSamples(index, config).starts(0, 0)
    begin = time.perf_counter()
    last, _ = next(islice(starts, config.train.log_interval, None))
    assert (last, time.perf_counter() - begin < 1.0) == (config.train.log_interval, True)
