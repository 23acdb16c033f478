"""How far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metro_megatron.config.schema import Config
from metro_megatron.data.batch import StepBatch
from metro_megatron.plan.flops import Amount, step_flops


@dataclass
class Progress:
    """What a run remembers beside weights, moments and figures."""

    done: int = 0
    """Steps done, those that were passed over among them."""
    seen_samples: int = 0
    """Global position of the next step's first sample."""
    seen_tokens: int = 0
    phase_begins: tuple[int, ...] = (0,)
    """Global positions at which the phases so far began."""
    branch: dict[str, Any] | None = None
    """Where the run branched from another, and the hash of that checkpoint."""
    flops: float | None = 0.0
    """Model FLOPs of all that has been trained on; None: a checkpoint of an earlier release does not say."""
    unlogged: Amount = field(default_factory=Amount)
    """What has been trained on since the last log line."""
    unlogged_flops: float = 0.0

    def passed_over(self, batch: StepBatch) -> None:
        """A step's samples are left behind without training."""
        self.done += 1
        self.seen_samples, self.phase_begins = batch.end, batch.phase_begins

    def trained(self, batch: StepBatch, config: Config) -> None:
        """A step has been launched."""
        amount = Amount(batch.num_tokens, batch.num_squares, batch.end - self.seen_samples)
        flops = step_flops(config, batch.step, amount)
        self.unlogged += amount
        self.unlogged_flops += flops
        self.flops = None if self.flops is None else self.flops + flops
        self.seen_tokens += batch.num_tokens
        self.passed_over(batch)

    def logged(self) -> tuple[Amount, float]:
        """What has been trained on since the last call, and its model FLOPs."""
        done = self.unlogged, self.unlogged_flops
        self.unlogged, self.unlogged_flops = Amount(), 0.0
        return done

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "step": self.done,
            "consumed_samples": self.seen_samples,
            "seen_tokens": self.seen_tokens,
            **({"flops": self.flops} if self.flops is not None else {}),
            **({"phase_begins": self.phase_begins} if len(self.phase_begins) > 1 else {}),
            **({"branch": self.branch} if self.branch else {}),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state` said."""
        return cls(
            done=state["step"],
            seen_samples=state["consumed_samples"],
            seen_tokens=state["seen_tokens"],
            phase_begins=tuple(state.get("phase_begins", [0])),
            branch=state.get("branch"),
            flops=state.get("flops"),
        )
