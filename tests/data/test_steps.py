"""Which samples a step has; that batches hold them is tests/data/test_loader.py's."""

import time
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config
from metro_megatron.data.samples import SampleIndex
from metro_megatron.data.steps import RunSamples


def index_of(lengths: np.ndarray, *bounds: int, seq_length: int = 512) -> SampleIndex:
    """An index of samples that lie nowhere."""
    content = int(lengths.sum(dtype=np.int64))
    return SampleIndex(
        np.zeros(0, np.int16), np.zeros(0, np.int64), lengths, (0, *bounds, len(lengths)), content, seq_length
    )


def test_steps_end_before_the_sample_that_is_too_much() -> None:
    index = index_of(np.random.default_rng(0).integers(20, 511, 5000).astype(np.int32), 1200)
    config = replace(Config(), train=replace(Config().train, global_batch_tokens=20_000))
    samples = RunSamples([index], config)
    (phase,) = samples.phases
    first = 0
    for step in range(60):
        end = samples.after(step, first)
        lengths = phase.lengths(phase.draws(first, end + 1 - first))
        assert lengths[:-1].sum() <= 20_000 < lengths.sum()
        first = end
    counted: list[int] = []
    assert samples.position(60, lambda step: (step - 3, samples.position(step - 3)), counted.append) == first
    assert counted == [58, 59, 60]
    of_samples = RunSamples([index], replace(config, train=replace(config.train, global_batch_size=7)))
    assert (of_samples.position(3), of_samples.after(3, 21)) == (21, 28)


def test_a_phase_begins_where_the_steps_before_it_end_whatever_is_known() -> None:
    rng = np.random.default_rng(1)
    long, short = (
        index_of(rng.integers(20, length - 1, 3000).astype(np.int32), 1000, seq_length=length) for length in (512, 256)
    )
    indices = [long, short, long]
    phases = [Phase(start=10, seq_length=256), Phase(start=20, weights=[0, 1])]
    train = replace(Config().train, global_batch_tokens=5000, train_steps=40, phases=phases)
    config = replace(Config(), train=train)
    plain, first, starts = RunSamples(indices, config), 0, [0]
    for step in range(40):
        first = plain.after(step, first)
        starts.append(first)
    assert plain.begins == [0, starts[10], starts[20]]
    for logged in (7, 10, 20, 1000):  # every so many steps
        samples = RunSamples(indices, config)
        known = [(done, starts[done]) for done in range(0, 41, logged)]
        assert samples.position(33, lambda step, known=known: max(one for one in known if one[0] <= step)) == starts[33]
        assert samples.begins == plain.begins
        drawn = [one.phases[2].draws(starts[33], 50).sample.tolist() for one in (plain, samples)]
        assert drawn[0] == drawn[1] and min(drawn[0]) >= 1000, "the second source alone"


def test_held_out_samples_have_an_order_of_their_own() -> None:
    index, config = index_of(np.full(300, 30, np.int32)), Config()
    splits: list[Literal["train", "validation"]] = ["train", "validation"]
    orders = [RunSamples([index], config, split).phases[0].draws(0, 300).sample for split in splits]
    assert (orders[0] != orders[1]).any() and all((np.sort(order) == np.arange(300)).all() for order in orders)


@pytest.mark.long
def test_the_steps_between_two_log_lines_are_counted_in_under_a_second() -> None:
    """At the default batch of a million tokens, of 20 million samples."""
    index = index_of(np.random.default_rng(0).integers(20, 511, 20_000_000).astype(np.int32), 7_000_000)
    config = Config()
    samples = RunSamples([index], config)
    begin = time.perf_counter()
    assert samples.position(config.train.log_interval) > 10_000
    assert time.perf_counter() - begin < 1.0
