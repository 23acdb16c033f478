"""Whether all ranks call the communication library in the same order: where they do not, a run waits for ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from metro_megatron.rehearsal.ranks import Place, Ranks
from metro_megatron.rehearsal.recording import RECEIVE, SEND, Call

Calls = Mapping[int, Sequence[Call]]
"""Of a step, by traced rank."""


def mismatches(calls: Calls, ranks: Ranks) -> list[str]:
    """Every group whose members do not make the same calls in the same order, with the first place where they differ.

    Every group of all ranks is looked at; groups for which the same ranks stand in are one.
    """
    found = [*_unknown_groups(calls, ranks)]
    if not found:
        found += _collectives(calls, ranks)
        found += _transfers(calls, ranks)
    return found


def _unknown_groups(calls: Calls, ranks: Ranks) -> Iterator[str]:
    for rank, of_rank in calls.items():
        for group in dict.fromkeys(call.group for call in of_rank):
            if ranks.kind_of(group) is None or rank not in group:
                yield f"rank {rank} calls {_listed(group)}, which is no group of the layout that it is in"


def _collectives(calls: Calls, ranks: Ranks) -> Iterator[str]:
    own = {
        (rank, kind): [call for call in of_rank if call.peer is None and ranks.kind_of(call.group) == kind]
        for rank, of_rank in calls.items()
        for kind in ranks.groups
    }
    for kind, groups in ranks.groups.items():
        seen: dict[tuple[int, ...], tuple[int, ...]] = {}
        for group in groups:
            seen.setdefault(tuple(dict.fromkeys(map(ranks.stand_in, group))), group)
        for stand_ins, group in seen.items():
            others = " and those alike" if len(groups) > 1 else ""
            for position, made in enumerate(zip_longest(*(own[rank, kind] for rank in stand_ins)), 1):
                if len({None if call is None else call.alike for call in made}) > 1:
                    what = "; ".join(f"rank {rank} {_made(call)}" for rank, call in zip(stand_ins, made, strict=True))
                    yield f"{kind} group of {_listed(group)}{others}, call {position}: {what}"
                    break


def _transfers(calls: Calls, ranks: Ranks) -> Iterator[str]:
    """From every traced rank to every other stage of its pipeline."""
    for source in calls:
        place = ranks.places[source]
        for stage in range(ranks.pipeline):
            target = ranks.rank_at(Place(place.tensor, place.data, stage))
            if target == source:
                continue
            sent = [call for call in calls[source] if call.operation == SEND and call.peer == target]
            asked = [call for call in calls[target] if call.operation == RECEIVE and call.peer == source]
            for position, (one, other) in enumerate(zip_longest(sent, asked), 1):
                if one is None or other is None or _carried(one) != _carried(other):
                    yield (
                        f"transfer {position} from rank {source} to rank {target}: "
                        f"rank {source} {_made(one)}; rank {target} {_made(other)}"
                    )
                    break
    strangers = (
        f"rank {rank} {_made(call)} with rank {call.peer}, which is in another pipeline"
        for rank, of_rank in calls.items()
        for call in of_rank
        if call.peer is not None and ranks.places[call.peer][:2] != ranks.places[rank][:2]
    )
    yield from dict.fromkeys(strangers)


def _carried(call: Call) -> tuple[object, ...]:
    return call.group, call.elements, call.dtype


def _made(call: Call | None) -> str:
    return "has no such call" if call is None else f"calls {call}"


def _listed(group: Sequence[int]) -> str:
    shown = ", ".join(map(str, group[:8]))
    return f"ranks {shown}" + (f", ... ({len(group):,} in all)" if len(group) > 8 else "")
