"""Sampled ids reach every pipeline rank in the order of the micro batches, however unevenly they were dealt out."""

import pytest
import torch
import torch.distributed as dist

from metro_megatron.parallel.exchange import exchange, share
from tests.distributed import run_ranks


def exchanged(counts: list[int]) -> list[list[int]]:
    """On every rank: micro batch j's ids are 100 j, 100 j + 1, ..."""
    group = dist.group.WORLD
    assert group is not None
    own = [torch.arange(counts[j]) + 100 * j for j in share(len(counts), group)]
    return [ids.tolist() for ids in exchange(own, counts, group)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_all_in_order(world_size: int) -> None:
    """More micro batches than ranks, fewer, empty ones, and none with a masked token."""
    for counts in ([3, 0, 5, 1], [2], [0, 0, 0], [4, 4, 4, 4, 4, 4, 1]):
        expected = [[100 * j + i for i in range(count)] for j, count in enumerate(counts)]
        for result in run_ranks(exchanged, world_size, counts):
            assert result == expected
