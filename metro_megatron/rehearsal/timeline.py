"""A step in time: what every traced rank computes, sends and waits for, played by the plan's model of speeds.

Products take their FLOPs at the plan's share of the GPU's rate, collectives and transfers their bytes at the rate of
the links that their group spans. Gradients and parameters that overlap with computation travel one after the other on a
line of their own; whatever else communicates keeps its rank from computing. What has been sent is taken to be buffered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metro_megatron.plan.layouts import Cluster
from metro_megatron.rehearsal.ranks import Ranks
from metro_megatron.rehearsal.recording import RECEIVE, SEND, Arrival, Call, Event, Mark

COMMUNICATING, WAITING, BUBBLE = "communicating", "waiting", "bubble"
"""Nothing beside it; for parameters, gradients or other ranks; for the stage before or behind."""
DATA_KINDS = ("data", "replica")
"""Groups over which parameters and gradients travel."""


@dataclass(frozen=True)
class Speeds:
    """What the step is played by."""

    flops: float
    """A second."""
    cluster: Cluster
    overlaps: bool
    """Whether parameters and gradients travel beside computation."""
    update: float
    """Seconds of the optimizer."""

    def collective(self, call: Call) -> float:
        """Seconds: a ring's, of which an all-reduce goes round twice."""
        size = len(call.group)
        rounds = 2 if call.operation == "all-reduce" else 1
        return self._link(call, call.group, rounds * (size - 1) / size)

    def transfer(self, call: Call, source: int) -> float:
        assert call.peer is not None
        return self._link(call, (source, call.peer), 1.0)

    def _link(self, call: Call, ranks: Sequence[int], share: float) -> float:
        return share * call.bytes / self.cluster.bandwidth(max(ranks) - min(ranks) + 1)


@dataclass(frozen=True)
class Span:
    """Seconds of the step, and what a rank does in them: a part of the step, or what keeps it from that."""

    begin: float
    end: float
    what: str


@dataclass
class _Meeting:
    """A collective under way."""

    seconds: float = 0.0
    size: int = 0
    """How many traced ranks take part."""
    came: dict[int, float] = field(default_factory=dict)
    """When each of them did."""
    before: list[_Meeting] = field(default_factory=list)
    """What is on their lines before it."""
    known: float | None = None

    @property
    def done(self) -> float | None:
        """When it is done; None while that is not known."""
        if self.known is None and len(self.came) == self.size:
            before = [meeting.done for meeting in self.before]
            if None not in before:
                self.known = max(*self.came.values(), 0.0, *(one for one in before if one is not None)) + self.seconds
        return self.known


@dataclass
class _Player:
    """One rank, as far as it has got."""

    rank: int
    events: Sequence[Event]
    next: int = 0
    now: float = 0.0
    part: str = "gather"
    computed: bool = False
    """Whether what is before the next event has been computed."""
    spans: list[Span] = field(default_factory=list)
    overlapping: list[_Meeting] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """Whom each receive is from."""
    counts: dict[object, int] = field(default_factory=lambda: defaultdict(int))

    def until(self, end: float, what: str) -> None:
        if end > self.now:
            self.spans.append(Span(self.now, end, what))
            self.now = end


class Play:
    """The traced ranks of a step, which stand in for all."""

    def __init__(self, steps: Mapping[int, Sequence[Event]], ranks: Ranks, speeds: Speeds):
        self.players = {rank: _Player(rank, events) for rank, events in steps.items()}
        self.ranks = ranks
        self.speeds = speeds
        self._meetings: dict[object, _Meeting] = defaultdict(_Meeting)
        self._sent: dict[tuple[int, int, int], float] = {}
        """When the n-th transfer from one rank to another arrives."""

    def run(self) -> dict[int, str]:
        """Play to the end, or until nobody can go on: what ranks then wait for."""
        moved = True
        while moved:
            moved = False
            for player in self.players.values():
                while player.next < len(player.events) and self._does(player):
                    player.next += 1
                    player.computed = False
                    moved = True
        return {rank: self._wanted(player) for rank, player in self.players.items() if player.next < len(player.events)}

    @property
    def seconds(self) -> float:
        return max(player.now for player in self.players.values())

    @property
    def spans(self) -> Mapping[int, list[Span]]:
        return {rank: player.spans for rank, player in self.players.items()}

    def share(self, what: str) -> float:
        """Of the step, over all traced ranks."""
        spans = [span for player in self.players.values() for span in player.spans if span.what == what]
        return sum(span.end - span.begin for span in spans) / (len(self.players) * self.seconds)

    def _does(self, player: _Player) -> bool:
        """Do the next event; False where the rank must wait for what has not happened."""
        event = player.events[player.next]
        if not player.computed:
            player.until(player.now + event.flops / self.speeds.flops, player.part)
            player.computed = True
        if isinstance(event.what, Mark):
            return self._mark(player, event.what)
        if isinstance(event.what, Arrival):
            return self._arrive(player, event.what.number)
        if event.what.operation == SEND:
            return self._send(player, event.what)
        if event.what.operation == RECEIVE:
            assert event.what.peer is not None
            player.asked.append(event.what.peer)
            return True
        return self._meet(player, event.what)

    def _mark(self, player: _Player, mark: Mark) -> bool:
        awaited = player.overlapping[: mark.awaited]
        if any(meeting.done is None for meeting in awaited):
            return False
        player.until(max((meeting.done or 0.0 for meeting in awaited), default=0.0), WAITING)
        player.part = mark.part
        if mark.part == "update":
            player.until(player.now + self.speeds.update, player.part)
        return True

    def _send(self, player: _Player, call: Call) -> bool:
        assert call.peer is not None
        number = self._count(player, (SEND, call.peer))
        self._sent[player.rank, call.peer, number] = player.now + self.speeds.transfer(call, player.rank)
        return True

    def _arrive(self, player: _Player, number: int) -> bool:
        source = player.asked[number]
        key = source, player.rank, player.asked[:number].count(source)
        if key not in self._sent:
            return False
        player.until(self._sent[key], BUBBLE)
        return True

    def _meet(self, player: _Player, call: Call) -> bool:
        kind = self.ranks.kind_of(call.group)
        members = frozenset(map(self.ranks.stand_in, call.group))
        overlaps = self.speeds.overlaps and kind in DATA_KINDS
        meeting = self._meetings[kind, members, player.counts[kind, members]]
        meeting.seconds, meeting.size = self.speeds.collective(call), len(members)
        meeting.came.setdefault(player.rank, player.now)
        if overlaps:
            meeting.before += player.overlapping[-1:]
            player.overlapping.append(meeting)
        elif meeting.done is None:
            return False
        else:
            player.until(meeting.done - meeting.seconds, WAITING)
            player.until(meeting.done, COMMUNICATING)
        self._count(player, (kind, members))
        return True

    def _count(self, player: _Player, key: object) -> int:
        number = player.counts[key]
        player.counts[key] += 1
        return number

    def _wanted(self, player: _Player) -> str:
        what = player.events[player.next].what
        if isinstance(what, Arrival):
            return f"a transfer from rank {player.asked[what.number]}"
        return f"its group in {what}" if isinstance(what, Call) else f"what overlaps before {what.part}"
