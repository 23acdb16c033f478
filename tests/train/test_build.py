"""What is built on every rank is of the same libraries."""

import pytest
import torch
import torch.distributed as dist

from metro_megatron import mcore
from metro_megatron.errors import UserError
from metro_megatron.parallel.layout import Layout
from metro_megatron.train.build import refuse_mixed_libraries
from tests.distributed import run_ranks
from tests.parity.small_run import small_config


def other_on_the_last_rank() -> list[str]:
    """On every rank: what is said where the last one's machine has other libraries."""
    config = small_config()
    layout = Layout.create(config.parallel, torch.device("cpu"))
    refuse_mixed_libraries(config, layout)
    if dist.get_rank() == 2:
        mcore.whose_layers = lambda config, device: "others"
    with pytest.raises(UserError) as caught:
        refuse_mixed_libraries(config, layout)
    layout.destroy()
    return caught.value.problems


def test_machines_with_other_libraries_are_named_on_every_rank() -> None:
    for first, last, remedy in run_ranks(other_on_the_last_rank, 3):
        assert first == "ranks 0, 1: megatron-core's linear layers"
        assert last == "ranks 2: others" and "set parallel.transformer_impl local" in remedy
