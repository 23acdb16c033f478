"""When a gradient norm is a spike: far above those of the steps before, by measures that spikes do not move."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

LENGTH = 128
"""Steps that are looked back on."""
LEAST = 32
"""Steps without which nothing is a spike."""
LAG = 2
"""A step is launched before the norm of the one before it is known to the host: whatever the rhythm of log lines and
saves, it is judged by those of LAG steps before, so that a resumed run skips the same steps."""
SIGMAS_OF_MAD = 1.4826
"""Standard deviations of a normal distribution to its median absolute deviation."""


class NormHistory:
    """Gradient norms of the last steps, skipped ones included: what stays high is no spike."""

    def __init__(self, threshold: float):
        """threshold: robust standard deviations above the median; 0: nothing is a spike."""
        self.threshold = threshold
        self._norms: deque[tuple[int, float]] = deque(maxlen=LENGTH + LAG)

    def add(self, step: int, norm: float) -> None:
        """Note the norm of a step, counted from 0."""
        if math.isfinite(norm):
            self._norms.append((step, norm))

    def limit(self, step: int) -> float:
        """Above which a step is skipped."""
        known = [norm for one, norm in self._norms if one <= step - LAG][-LENGTH:]
        if not self.threshold or len(known) < LEAST:
            return math.inf
        middle = median(known)
        return middle + self.threshold * SIGMAS_OF_MAD * median(abs(norm - middle) for norm in known)

    def state(self) -> dict[str, float]:
        """For a checkpoint: norms by step."""
        return {str(step): norm for step, norm in self._norms}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self._norms.extend((int(step), norm) for step, norm in state.items())
