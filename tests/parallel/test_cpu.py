"""What stands between megatron-core and gloo."""

from collections import Counter
from typing import Any

import torch.distributed as dist

from metro_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.parity.small_run import run_steps, small_config, start, use_small_buckets


def coalesced_calls(config: Config) -> dict[str, int]:
    """On every rank: the coalesced collectives of one overlapped step, by name."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(dist.ProcessGroup, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    names = [name for name in dir(dist.ProcessGroup) if "coalesced" in name]
    assert any("reduce_scatter" in name for name in names)
    for name in names:
        setattr(dist.ProcessGroup, name, counted(name))
    use_small_buckets()
    trainer = start(config)
    run_steps(trainer, 0, 1)
    trainer.close()
    return dict(calls)


def test_no_coalesced_collective_reaches_gloo():
    """gloo's asynchronous coalesced reduce-scatter damages memory (torch 2.13)."""
    config = small_config()
    assert config.parallel.overlap
    assert run_ranks(coalesced_calls, 2, config) == [{}, {}]
