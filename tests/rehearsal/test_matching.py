"""Calls that do not match are named: group, place in its order, ranks, and what each of them calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from megatron.core import parallel_state

from metro_megatron.rehearsal.matching import mismatches
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call
from tests.rehearsal.calls import EIGHT, call, step

Steps = dict[int, list[Call]]


def all_steps() -> Steps:
    return {rank: step(rank) for rank in range(8)}


def test_ranks_that_match() -> None:
    assert mismatches(all_steps(), EIGHT) == []


def left_out(steps: Steps) -> None:
    del steps[3][2]


def of_another_size(steps: Steps) -> None:
    steps[1][0] = call(1, "tensor", elements=5)


def exchanged(steps: Steps) -> None:
    steps[6][0], steps[6][2] = steps[6][2], steps[6][0]


def sent_twice(steps: Steps) -> None:
    steps[2].insert(1, steps[2][1])


def asked_of_nobody(steps: Steps) -> None:
    steps[0].append(call(0, "pipeline", "receive", 8, 4))


def to_another_pipeline(steps: Steps) -> None:
    steps[0][1] = Call("send", tuple(range(8)), 8, "float32", 32, peer=5)


def in_no_group(steps: Steps) -> None:
    steps[5].append(Call("all-reduce", (1, 5, 7), 4, "float32", 16))


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (
            left_out,
            "tensor group of ranks 2, 3 and those alike, call 2: rank 2 calls all-reduce of 6 float32; "
            "rank 3 has no such call",
        ),
        (
            of_another_size,
            "tensor group of ranks 0, 1 and those alike, call 1: rank 0 calls all-reduce of 4 float32; "
            "rank 1 calls all-reduce of 5 float32",
        ),
        (
            exchanged,
            "tensor group of ranks 6, 7 and those alike, call 1: rank 6 calls all-reduce of 6 float32; "
            "rank 7 calls all-reduce of 4 float32",
        ),
        (
            sent_twice,
            "transfer 2 from rank 2 to rank 6: rank 2 calls send of 8 float32; rank 6 has no such call",
        ),
        (
            asked_of_nobody,
            "transfer 1 from rank 4 to rank 0: rank 4 has no such call; rank 0 calls receive of 8 float32",
        ),
        (
            to_another_pipeline,
            "rank 0 calls send of 8 float32 with rank 5, which is in another pipeline",
        ),
        (in_no_group, "rank 5 calls ranks 1, 5, 7, which is no group of the layout that it is in"),
    ],
)
def test_a_planted_mismatch_is_named(plant: Callable[[Steps], None], expected: str) -> None:
    steps = all_steps()
    plant(steps)
    assert expected in mismatches(steps, EIGHT)


def test_those_who_are_traced_stand_in_for_all() -> None:
    """Of 4 x 4 x 2 ranks: two of each dimension but the pipeline, and in every group all members' stand-ins."""
    ranks = Ranks(tensor=4, data=4, pipeline=2)
    assert ranks.traced == [0, 1, 12, 13, 16, 17, 28, 29]
    assert {ranks.stand_in(rank) for rank in ranks.groups["tensor"][2]} == {12, 13}
    assert {ranks.stand_in(rank) for rank in ranks.groups["data"][0]} == {0, 12}
    assert [ranks.rank_at(place) for place in ranks.places] == list(range(32))


@pytest.mark.parametrize(("tensor", "data", "pipeline"), [(2, 2, 2), (1, 4, 2), (4, 128, 1), (8, 64, 8)])
def test_groups_are_those_of_the_layout(tensor: int, data: int, pipeline: int) -> None:
    ranks = Ranks(tensor, data, pipeline)
    tokens = {"tensor": "tp", "data": "dp", "pipeline": "pp", "model": "tp-pp"}
    generator = parallel_state.RankGenerator(tensor, 1, data, pipeline, 1, "tp-cp-ep-dp-pp")
    for kind, groups in ranks.groups.items():
        assert sorted(rank for group in groups for rank in group) == list(range(ranks.world_size))
        if kind in tokens:
            assert [list(group) for group in groups] == generator.get_ranks(tokens[kind])
        if kind == "replica":  # parallel/layout.py makes these itself
            assert groups == [tuple(range(first, ranks.world_size, tensor)) for first in range(tensor)]
