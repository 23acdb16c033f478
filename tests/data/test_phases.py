"""Phases of the data: what each draws, what no phase draws again, and that a run finds its place in any of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metro_megatron.config.phases import Phase
from metro_megatron.config.schema import Config, DataConfig, ObjectiveConfig, TrainConfig
from metro_megatron.data.batch import StepBatch
from metro_megatron.data.loader import PretrainingData
from metro_megatron.data.samples import SampleIndex, build_sample_index
from metro_megatron.errors import UserError
from metro_megatron.randomness import Permutation, Purpose
from tests.data.test_loader import contents

SEED, STEPS = 5, 12
OTHER_WEIGHTS = Phase(3, weights=[0, 2])
OTHER_LENGTH = Phase("50%", seq_length=24, mask_probability=0.3)
MASKS_ALONE = Phase(9, mask_probability=0.3)
Shards = list[Any]


@pytest.fixture
def shards(make_shard: Any, lognormal_documents: Any) -> Shards:
    return [make_shard(lognormal_documents(30, median=60, seed=number), number) for number in range(2)]


def config_of(phases: list[Phase], batch_size: int = 0) -> Config:
    return Config(
        objective=ObjectiveConfig(mask_probability=0.15),
        data=DataConfig(seq_length=48, micro_batch_tokens=128, weights=[3, 1], prefetch_steps=1),
        train=TrainConfig(
            seed=SEED, train_steps=STEPS, phases=phases, global_batch_size=batch_size, global_batch_tokens=700
        ),
    )


def indices_of(shards: Shards, config: Config) -> list[SampleIndex]:
    return [build_sample_index(shards, phase.data.seq_length) for phase in config.by_phase]


def data_of(shards: Shards, config: Config, **options: Any) -> PretrainingData:
    index, *others = indices_of(shards, config)
    return PretrainingData(index, shards, config, phase_indices=others, **options)


def steps_of(data: PretrainingData, first: int = 0, position: int = 0) -> list[StepBatch]:
    return list(data.prefetch(first, STEPS, position))


def samples_of(batches: list[StepBatch]) -> list[int]:
    """Sample ids in the order of their global positions."""
    found = [
        (place, sample)
        for batch in batches
        for one in batch.micro_batches
        for place, sample in zip(one.sample_places.tolist(), one.sample_ids.tolist(), strict=True)
    ]
    assert [place for place, _ in sorted(found)] == list(range(sorted(found)[0][0], batches[-1].end))
    return [sample for _, sample in sorted(found)]


def test_the_hash_of_the_last_samples_is_of_the_order_and_the_text_alone(shards: Shards) -> None:
    """In every layout, behind a border of phases, and whoever only knows where the phases began."""
    phases = [OTHER_WEIGHTS, OTHER_LENGTH]
    data = data_of(shards, config_of(phases))
    last = steps_of(data)[6]  # the first step of other samples: the 64 are of both phases
    assert last.end - last.phase_begins[-1] < 64 < last.end
    hashed = data.hash_of_last(last.end)
    for options in ({"dp_rank": 1, "dp_size": 2}, {"dp_rank": 0, "dp_size": 3}):
        assert (
            data_of(shards, config_of(phases), phase_begins=last.phase_begins, **options).hash_of_last(last.end)
            == hashed
        )
    other = replace(config_of(phases), train=replace(config_of(phases).train, seed=SEED + 1))
    shorter = (0, last.phase_begins[1], last.phase_begins[2] - 1)
    assert data_of(shards, other, phase_begins=last.phase_begins).hash_of_last(last.end) != hashed
    assert data_of(shards, config_of(phases), phase_begins=shorter).hash_of_last(last.end) != hashed
    assert data.hash_of_last(last.end - 1) != hashed


def test_sources_go_on_where_they_stand_and_other_samples_begin_the_next_epoch(shards: Shards) -> None:
    """Against the keyed permutations themselves, with each source counted by hand."""
    config = config_of([OTHER_WEIGHTS, OTHER_LENGTH, Phase(9, seq_length=24, weights=[1, 1])])
    batches = steps_of(data_of(shards, config))
    assert [batch.phase_begins for batch in batches[2:7]] == [
        (0,),
        *[(0, batches[2].end)] * 3,
        (0, batches[2].end, batches[5].end),
    ]
    long, _, short, _ = indices_of(shards, config)
    before = [0, 0]
    for number, begin, end in ((0, 0, 3), (1, 3, 6), (2, 6, 9), (3, 9, STEPS)):
        index = long if number < 2 else short
        sizes = np.diff(index.source_bounds).tolist()
        if number == 2:
            assert 0 < before[0] < long.source_bounds[1] and before[1] > sizes[1] // 4
            old = np.diff(long.source_bounds).tolist()
            before = [-(-count // size) * new for count, size, new in zip(before, old, sizes, strict=True)]
        drawn = samples_of(batches[begin:end])
        sources = [int(sample >= index.source_bounds[1]) for sample in drawn]
        share = [3 / 4, 0, 3 / 4, 1 / 2][number]
        assert abs(sources.count(0) - share * len(drawn)) < 1
        for sample, source in zip(drawn, sources, strict=True):
            epoch, within = divmod(before[source], sizes[source])
            permutation = Permutation(sizes[source], SEED, Purpose.ORDER, epoch)
            assert sample == index.source_bounds[source] + permutation[[within]][0]
            before[source] += 1
    lengths = [max(one.max_seqlen for one in batch.micro_batches) for batch in batches]
    assert max(lengths[:6]) == 48 and max(lengths[6:]) == 24


def test_masks_alone_leave_the_order_as_it_is_and_only_add_masks(shards: Shards) -> None:
    phased, plain = (steps_of(data_of(shards, config_of(phases))) for phases in ([MASKS_ALONE], []))
    assert samples_of(phased) == samples_of(plain) and [one.end for one in phased] == [one.end for one in plain]
    for step, (batch, other) in enumerate(zip(phased, plain, strict=True)):
        for one, two in zip(batch.micro_batches, other.micro_batches, strict=True):
            shared = set(one.masked_index.tolist()) & set(two.masked_index.tolist())
            assert len(shared) == two.masked_index.numel()
        assert (batch.num_masked == other.num_masked) == (step < 9)
    assert sum(one.num_masked for one in phased[9:]) / sum(one.num_tokens for one in phased[9:]) == pytest.approx(
        0.3, abs=0.03
    )


@pytest.mark.parametrize("batch_size", [0, 16])
def test_a_run_goes_on_at_every_step_and_on_all_ranks(shards: Shards, batch_size: int) -> None:
    """At borders, before and behind them: the same samples, masks and noise, and the same from two ranks."""
    config = config_of([OTHER_WEIGHTS, OTHER_LENGTH, MASKS_ALONE], batch_size)
    whole = steps_of(data_of(shards, config))
    for step in (2, 3, 4, 6, 9, 11):
        done = whole[step - 1]
        resumed = data_of(shards, config, phase_begins=done.phase_begins)
        for one, other in zip(steps_of(resumed, step, done.end), whole[step:], strict=True):
            assert contents([one]) == contents([other]) and one.phase_begins == other.phase_begins
    ranks = [steps_of(data_of(shards, config, dp_rank=rank, dp_size=2)) for rank in range(2)]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert contents(batches) == contents([whole[step]])
        assert {(one.end, one.num_masked, one.phase_begins) for one in batches} == {
            (whole[step].end, whole[step].num_masked, whole[step].phase_begins)
        }


def test_no_sample_comes_twice_with_the_same_masks(make_shard: Any) -> None:
    """Texts that are one sample in either length would come again with their masks, were epochs counted anew."""
    shard = make_shard([[10 + number % 9] for number in range(150)])
    config = config_of([Phase(4, seq_length=24), Phase(8, seq_length=48)])
    config = Config(data=DataConfig(seq_length=48, micro_batch_tokens=128), train=config.train)
    found: Counter[Any] = Counter()
    for batch in steps_of(data_of([shard], config)):
        found += contents([batch])
    assert max(found.values()) == 1
    assert max(Counter(sample for sample, *_ in found).values()) > 1


def test_weights_that_no_phase_can_have(shards: Shards) -> None:
    with pytest.raises(UserError, match="are all 0"):
        steps_of(data_of(shards, config_of([Phase(3, weights=[0, 0])])))
    with pytest.raises(UserError, match="must be not negative and finite"):
        steps_of(data_of(shards, config_of([Phase(3, weights=[-1, 1])])))


def test_evaluations_are_those_of_the_run_s_own_options(shards: Shards) -> None:
    """Whatever the phase, so that a curve has no step at a border."""
    phased, plain = config_of([Phase(2, seq_length=24, mask_probability=0.5)]), config_of([])
    index = build_sample_index(shards, 48)
    one, other = (
        PretrainingData(index, shards, config, split="validation").evaluation_batches(40, 16)
        for config in (phased, plain)
    )
    assert [contents([batch]) for batch in one] == [contents([batch]) for batch in other]
