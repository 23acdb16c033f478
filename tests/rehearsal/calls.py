"""Calls of ranks by hand."""

from __future__ import annotations

from collections.abc import Sequence

from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import Call, Event

EIGHT = Ranks(tensor=2, data=2, pipeline=2)


def group_of(rank: int, kind: str, ranks: Ranks = EIGHT) -> tuple[int, ...]:
    return next(group for group in ranks.groups[kind] if rank in group)


def call(rank: int, kind: str, operation: str = "all-reduce", elements: int = 4, peer: int | None = None) -> Call:
    """In the rank's group of a kind."""
    return Call(operation, group_of(rank, kind), elements, "float32", 4 * elements, peer=peer)


def step(rank: int) -> list[Call]:
    """One of eight ranks: tensor-parallel sums around a transfer from stage 0 to stage 1, and the world's sum."""
    transfer = (
        call(rank, "pipeline", "send", 8, rank + 4) if rank < 4 else call(rank, "pipeline", "receive", 8, rank - 4)
    )
    return [call(rank, "tensor"), transfer, call(rank, "tensor", elements=6), call(rank, "world", elements=3)]


def events(calls: Sequence[Call], flops: float = 0.0) -> list[Event]:
    """With so many FLOPs before each."""
    return [Event(one, flops) for one in calls]
