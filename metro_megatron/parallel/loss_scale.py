"""fp16's dynamic loss scale on the device: it changes with every step, and no step waits for it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import Tensor


class LossScale(DynamicGradScaler):
    """megatron-core's rule and its part of a checkpoint, in tensors.

    The scale is multiplied by backoff_factor, but not below min_scale, at every overflow from the hysteresis-th one on,
    and by growth_factor after growth_interval steps in a row without one, after which hysteresis counts anew.
    """

    _scale: Tensor
    _growth_tracker: Tensor
    _hysteresis_tracker: Tensor

    @classmethod
    def like(cls, plain: DynamicGradScaler) -> LossScale:
        """With the options of another, which has not been used yet."""
        scale = cls(
            *(float(one) for one in (plain.scale, plain.min_scale, plain.growth_factor, plain.backoff_factor)),
            growth_interval=plain.growth_interval,
            hysteresis=plain.hysteresis,
        )
        scale._fill_trackers()
        return scale

    def update(self, found_inf: Tensor) -> None:  # type: ignore[override]
        """found_inf [1]: not 0 after a step with a gradient that is not finite."""
        overflow = found_inf != 0
        growth = torch.where(overflow, 0, self._growth_tracker + 1)
        left = self._hysteresis_tracker - overflow.int()
        lowered = torch.max(self._scale * self.backoff_factor, self.min_scale)
        scale = torch.where(overflow & (left <= 0), lowered, self._scale)
        grows = growth == self.growth_interval
        self._scale = torch.where(grows, scale * self.growth_factor, scale)
        self._growth_tracker = torch.where(grows, 0, growth)
        self._hysteresis_tracker = torch.where(grows, self.hysteresis, left)

    def state_dict(self) -> dict[str, Any]:
        """As megatron-core's. Waits for the device."""
        trackers = ("growth_tracker", "hysteresis_tracker")
        return {**super().state_dict(), **{name: int(getattr(self, f"_{name}")) for name in trackers}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._fill_trackers()

    def _fill_trackers(self) -> None:
        """Tensors of the numbers that megatron-core has put there."""
        self._growth_tracker, self._hysteresis_tracker = (
            torch.full_like(self._scale, int(number), dtype=torch.int32)
            for number in (self._growth_tracker, self._hysteresis_tracker)
        )
