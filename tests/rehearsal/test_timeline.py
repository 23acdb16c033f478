"""A step is played as by hand, and ranks that wait for each other in a circle are found."""

from __future__ import annotations

import pytest

from metro_megatron.plan.gpus import GPUS
from metro_megatron.plan.layouts import Cluster
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Arrival, Call, Event, Mark
from metro_megatron.rehearsal.timeline import COMMUNICATING, WAITING, Play, Speeds
from tests.rehearsal.calls import EIGHT, call, events, step

CLUSTER = Cluster(GPUS["a100-80g"], 8, 0.5, 22e9)
SPEEDS = Speeds(flops=1.0, cluster=CLUSTER, overlaps=False, update=0.0)
TWO_STAGES = Ranks(tensor=1, data=1, pipeline=2)


def one_forward_one_backward(stage: int, count: int) -> list[Event]:
    """Of two stages, forward 1 s and backward 2 s; nothing is sent that has a size."""
    other, found, received = 1 - stage, [], 0

    def receive() -> None:
        nonlocal received
        found.extend([Event(Call("receive", (0, 1), 0, "float32", 0, peer=other), 0.0), Event(Arrival(received), 0.0)])
        received += 1

    def work(seconds: float) -> None:
        found.append(Event(Call("send", (0, 1), 0, "float32", 0, peer=other), seconds))

    found.append(Event(Mark("main", 0), 0.0))
    if stage == 1:
        for _ in range(count):
            receive()
            work(3.0)
        return found
    work(1.0)
    for _ in range(count - 1):
        work(1.0)
        receive()
        found.append(Event(Mark("main", 0), 2.0))
    receive()
    found.append(Event(Mark("main", 0), 2.0))
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_bubble_of_two_stages(count: int) -> None:
    """(M + pp - 1) times a micro batch's 3 s; each stage waits for 3 of them."""
    play = Play({stage: one_forward_one_backward(stage, count) for stage in (0, 1)}, TWO_STAGES, SPEEDS)
    assert play.run() == {}
    assert play.seconds == pytest.approx(3 * (count + 1))
    assert play.share("main") == pytest.approx(count / (count + 1))


def test_collectives_take_their_bytes() -> None:
    """An all-reduce of 2 ranks beside each other: once their bytes, by NVLink; the late one keeps the other waiting."""
    ranks, size = Ranks(tensor=2, data=1, pipeline=1), 10**9
    steps = {
        rank: [Event(Call("all-reduce", (0, 1), size, "float32", 4 * size), flops)]
        for rank, flops in ((0, 1.0), (1, 3.0))
    }
    play = Play(steps, ranks, SPEEDS)
    assert play.run() == {}
    seconds = 4 * size / CLUSTER.bandwidth(2)
    assert play.seconds == pytest.approx(3 + seconds)
    assert play.share(WAITING) * play.seconds == pytest.approx(2 / 2)
    assert play.share(COMMUNICATING) * play.seconds == pytest.approx(seconds)


def test_what_overlaps_is_waited_for_at_the_end_of_a_part() -> None:
    """Two gathers one after the other on a line of their own, behind 1 s of work; the first one must be there."""
    ranks, size = Ranks(tensor=1, data=2, pipeline=1), 10**9
    gather = Event(Call("all-gather", (0, 1), size, "float32", 4 * size), 0.0)
    seconds = 4 * size / 2 / CLUSTER.bandwidth(2)
    for awaited, expected in ((1, seconds + 1), (2, 2 * seconds + 1), (None, 2 * seconds + 1)):
        steps = [gather, gather, Event(Mark("corrupt", awaited), 0.0), Event(Mark("main", 0), 1.0)]
        play = Play({0: steps, 1: steps}, ranks, Speeds(1.0, CLUSTER, True, 0.0))
        assert play.run() == {} and play.seconds == pytest.approx(expected)


def test_ranks_that_wait_in_a_circle_are_found() -> None:
    """Every group's calls are in one order on all its members, but no two ranks can go on."""
    steps = {rank: step(rank) for rank in range(8)}
    assert Play({rank: events(own) for rank, own in steps.items()}, EIGHT, SPEEDS).run() == {}
    for rank in (0, 3):
        steps[rank] = [call(rank, "tensor"), call(rank, "data"), call(rank, "pipeline"), call(rank, "world")]
    for rank in (1, 2):
        steps[rank] = [call(rank, "data"), call(rank, "tensor"), call(rank, "pipeline"), call(rank, "world")]
    for rank in range(4, 8):
        steps[rank] = [call(rank, "pipeline"), call(rank, "world")]
    stalled = Play({rank: events(own) for rank, own in steps.items()}, EIGHT, SPEEDS).run()
    assert stalled[0] == "its group in all-reduce of 4 float32" and set(stalled) == set(range(8))
