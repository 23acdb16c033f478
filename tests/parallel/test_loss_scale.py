"""The loss scale on the device against megatron-core's on the host."""

from __future__ import annotations

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from metro_megatron.parallel import cpu
from metro_megatron.parallel.loss_scale import LossScale


def test_it_is_megatron_core_s_at_every_step() -> None:
    """Overflows at random and in rows, from often to hardly ever; saved, and loaded into a new one, on the way."""
    cpu.install()
    options = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 5, "hysteresis": 2}
    plain = DynamicGradScaler(initial_scale=2.0**10, min_scale=4.0, **options)
    ours = LossScale.like(plain)
    generator, scales = torch.Generator().manual_seed(0), set()
    for step in range(600):
        rate = (0.6, 0.15, 0.02)[step // 100 % 3]
        overflow = torch.rand(1, generator=generator) < rate
        plain.update(bool(overflow))
        ours.update(overflow.float())
        assert ours.state_dict() == plain.state_dict(), step
        scales.add(float(ours.scale))
        if step % 50 == 0:
            state = ours.state_dict()
            ours = LossScale.like(DynamicGradScaler(initial_scale=8.0, min_scale=4.0, **options))
            ours.load_state_dict(state)
    assert min(scales) == 4.0 and len(scales) > 8
