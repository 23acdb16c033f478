"""What a step does between its calls of the communication library, and those calls, in order, on one rank.

Every collective of a process, ours, megatron-core's and torch's, is an operator of torch's dispatcher, whatever
library carries it out: one recorder sees those of gloo and those of a group that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}
"""Of operators; any other keeps its own."""
SEND, RECEIVE = "send", "receive"
GATHER_OBJECTS = "all-gather"


@dataclass(frozen=True)
class Call:
    """A collective, or one end of a transfer, as one rank launches it."""

    operation: str
    group: tuple[int, ...]
    """Global ranks."""
    elements: int
    """Of the whole: what is reduced or scattered, what has been gathered, what is sent."""
    dtype: str
    bytes: int
    root: int | None = None
    """The rank in the group that broadcasts."""
    peer: int | None = None
    """Global rank at the other end of a transfer."""

    @property
    def alike(self) -> tuple[object, ...]:
        """What must be the same on all members of the group."""
        return self.operation, self.elements, self.dtype, self.root

    def __str__(self) -> str:
        whence = "" if self.root is None else f" from {self.root}"
        return f"{self.operation}{whence} of {self.elements:,} {self.dtype}"


@dataclass(frozen=True)
class Arrival:
    """The rank waits for what its `number`-th receive asked for."""

    number: int


@dataclass(frozen=True)
class Mark:
    """Here a part of the step begins."""

    part: str
    awaited: int | None
    """How many of the step's overlapping collectives must be done; None: all so far."""


@dataclass(frozen=True)
class Event:
    """Something of a step that others see or wait for, and the FLOPs of the rank since the one before."""

    what: Call | Arrival | Mark
    flops: float


def calls(events: Iterable[Event]) -> list[Call]:
    return [event.what for event in events if isinstance(event.what, Call)]


class Recorder(TorchDispatchMode):
    """Inside the block, keeps the calls and counts the FLOPs of this process. Groups of one rank are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._flops = 0.0
        self._receives = 0
        self._is_inside = False
        """Of a call that is noted as a whole."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._is_inside:
            return made
        if func.namespace == "c10d":
            names = [one.name for one in func._schema.arguments]
            self._call(func._schema.name.partition("::")[2], dict(zip(names, args, strict=False)))
        elif func._overloadpacket in flop_registry:
            self._flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        return made

    def taken(self) -> list[Event]:
        """What has been recorded; the recorder begins anew."""
        events, self.events, self._flops, self._receives = self.events, [], 0.0, 0
        return events

    def mark(self, part: str, awaited: int | None) -> None:
        self._add(Mark(part, awaited))

    @contextmanager
    def arrivals(self) -> Iterator[None]:
        """Inside the block, waiting for what a process group that is not there was asked for is an event, too."""
        asked: dict[int, tuple[Any, int]] = {}
        receive, wait = ProcessGroup.recv, FakeWork.wait

        def receiving(*args: Any, **kwargs: Any) -> Any:
            work = receive(*args, **kwargs)
            asked[id(work)] = work, self._receives - 1  # kept, so that no other gets its address
            return work

        def waiting(work: Any, *args: Any, **kwargs: Any) -> Any:
            if id(work) in asked:
                self._add(Arrival(asked.pop(id(work))[1]))
            return wait(work, *args, **kwargs)

        with patch.object(ProcessGroup, "recv", receiving), patch.object(FakeWork, "wait", waiting):
            yield

    @contextmanager
    def objects(self) -> Iterator[None]:
        """Inside the block, a gather of objects is one call: what it is made of depends on values."""
        gather = dist.all_gather_object

        def gathering(everyone: list[Any], own: Any, group: ProcessGroup | None = None) -> None:
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            if len(ranks) > 1:
                self._add(Call(GATHER_OBJECTS, ranks, 0, "objects", 0))
            self._is_inside = True
            try:
                gather(everyone, own, group)
            finally:
                self._is_inside = False

        with patch.object(dist, "all_gather_object", gathering):
            yield

    def _add(self, what: Call | Arrival | Mark) -> None:
        self.events.append(Event(what, self._flops))
        self._flops = 0.0

    def _call(self, operator: str, given: dict[str, Any]) -> None:
        ranks = tuple(dist.get_process_group_ranks(ProcessGroup.unbox(given["process_group"])))
        if len(ranks) == 1:
            return
        name = NAMES.get(operator, operator)
        whole = max(([*_tensors(one)] for one in given.values()), key=_elements)
        peer = given.get("dst", given.get("src"))
        self._receives += name == RECEIVE
        self._add(
            Call(
                operation=name,
                group=ranks,
                elements=_elements(whole),
                dtype=str(whole[0].dtype).removeprefix("torch."),
                bytes=_elements(whole) * whole[0].element_size(),
                root=given.get("root_rank"),
                peer=None if peer is None else ranks[peer],
            )
        )


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(one.numel() for one in tensors)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)
