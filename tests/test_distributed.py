import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def sum_of_ranks(offset: int) -> tuple[int, float, str]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.environ["WORLD_SIZE"]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a mistake on rank 1")
    dist.barrier()


def sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_of_every_rank():
    assert run_ranks(sum_of_ranks, 3, 10) == [(rank, 33.0, "3") for rank in range(3)]


def test_a_rank_s_exception_is_raised_with_its_traceback():
    with pytest.raises(Exception, match=r"(?s)fail_on_rank_1.*a mistake on rank 1"):
        run_ranks(fail_on_rank_1, 2)


def test_a_hang_ends():
    start = time.monotonic()
    with pytest.raises(Exception, match=r"took over 5 s|(?i:timed out|timeout|connection closed)"):
        run_ranks(sleep_on_rank_1, 2, timeout=5)
    assert time.monotonic() - start < 60
