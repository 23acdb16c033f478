"""Sampled ids reach every pipeline rank in the order of the micro batches, however unevenly they were dealt out."""

import pytest
import torch
import torch.distributed as dist

from metro_megatron.parallel.exchange import exchange, share
from tests.distributed import run_ranks

COUNTS = ([3, 0, 5, 1], [2], [0, 0, 0], [4, 4, 4, 4, 4, 4, 1])
"""Masked tokens of each micro batch: more micro batches than ranks, fewer, without any masked token."""


def exchanged() -> list[list[list[int]]]:
    """On every rank, for each of COUNTS: micro batch j's ids are 100 j, 100 j + 1, ..."""
    group = dist.group.WORLD
    assert group is not None
    results = []
    for counts in COUNTS:
        own = [torch.arange(counts[j]) + 100 * j for j in share(len(counts), group)]
        results.append([ids.tolist() for ids in exchange(own, list(counts), group)])
    return results


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_all_in_order(world_size: int) -> None:
    expected = [[[100 * j + i for i in range(count)] for j, count in enumerate(counts)] for counts in COUNTS]
    for result in run_ranks(exchanged, world_size):
        assert result == expected
