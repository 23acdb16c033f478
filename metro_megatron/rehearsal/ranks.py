"""Who is in which group, and which ranks do the same.

Ranks are numbered by megatron-core's own generator. What a rank does depends on its pipeline stage, on whether it is
the first of its tensor-parallel ranks, which adds up the figures, and on the samples that its data-parallel rank reads.
So one or two stand in for all of a dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron.core.parallel_state import RankGenerator

from metro_megatron.config.schema import ParallelConfig

DIMENSIONS = {
    "tensor": "tp",
    "pipeline": "pp",
    "data": "dp",
    "replica": "dp-pp",
    "model": "tp-pp",
    "world": "tp-dp-pp",
}
"""Groups of parallel/layout.py, and over what megatron-core's generator makes them go."""


class Place(NamedTuple):
    """Of a rank in each dimension."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run."""

    tensor: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Ranks:
        return cls(
            parallel.tensor_model_parallel_size,
            world_size // parallel.model_ranks,
            parallel.pipeline_model_parallel_size,
        )

    def __str__(self) -> str:
        return f"{self.world_size:,} ranks in {sum(map(len, self.groups.values())):,} groups"

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    @cached_property
    def groups(self) -> Mapping[str, list[tuple[int, ...]]]:
        """All groups of more than one rank, by kind; groups of two kinds that are the same are of the first."""
        generator = RankGenerator(self.tensor, 1, self.data, self.pipeline, 1, order="tp-cp-ep-dp-pp")
        found: dict[str, list[tuple[int, ...]]] = {}
        for kind, token in DIMENSIONS.items():
            made = [tuple(ranks) for ranks in generator.get_ranks(token)]
            if len(made[0]) > 1 and made not in found.values():
                found[kind] = made
        return found

    @cached_property
    def places(self) -> list[Place]:
        """By rank."""
        return [
            Place(rank % self.tensor, rank // self.tensor % self.data, rank // self.tensor // self.data)
            for rank in range(self.world_size)
        ]

    def rank_at(self, place: Place) -> int:
        return place.tensor + self.tensor * (place.data + self.data * place.pipeline)

    def stand_in(self, rank: int) -> int:
        """Who is traced for a rank: of each stage two tensor-parallel ranks of the first and last data-parallel one."""
        tensor, data, pipeline = self.places[rank]
        return self.rank_at(Place(min(tensor, 1), self.data - 1 if data else 0, pipeline))

    @property
    def traced(self) -> list[int]:
        return sorted({self.stand_in(rank) for rank in range(self.world_size)})

    def kind_of(self, group: Iterable[int]) -> str | None:
        """Of what kind a group is; None if it is none of a layout's."""
        return self._kinds.get(tuple(sorted(group)))

    @cached_property
    def _kinds(self) -> dict[tuple[int, ...], str]:
        return {group: kind for kind, groups in self.groups.items() for group in groups}
