"""Phases of a run: from some step on, samples, masks or rates are others."""

from dataclasses import dataclass, field
from typing import Annotated

from metro_megatron.cli.options import Range, at_least
from metro_megatron.schedule import Steps


@dataclass(frozen=True)
class Phase:
    """What is other from a step on; what it leaves out is as the run's own options say, not as in the phase before."""

    start: Steps
    """Steps done when it begins, or their share of the run."""
    seq_length: Annotated[int, at_least(0)] = 0
    """Longest sample in tokens, <s> and </s> included; 0: data.seq_length."""
    weights: list[float] = field(default_factory=list)
    """How often the sources of data.train are drawn from, 0 for never; none: data.weights."""
    mask_probability: Annotated[float, Range(0, 1)] = 0.0
    """Share of a sample's tokens that are masked; 0: objective.mask_probability."""
    lr_factor: Annotated[float, at_least(0)] = 1.0
    """Factor of the learning rate."""
