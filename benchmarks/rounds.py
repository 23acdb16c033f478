"""Steps of several kinds in turn, one of each a round; their times are ratios to the first kind's of the same round."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.results import Row

RATIOS = ("time_ratio", "lower_quartile", "upper_quartile", "processor_ratio")


@dataclass(frozen=True)
class Taken:
    """By one step."""

    seconds: float
    processor: float
    """Processor seconds of this process, all threads."""


def timed(action: Callable[[], object], device: torch.device) -> Taken:
    """What an action takes, and all that it starts on the device."""
    _synchronize(device)
    begin, processor = time.perf_counter(), time.process_time()
    action()
    _synchronize(device)
    return Taken(time.perf_counter() - begin, time.process_time() - processor)


def compared(own: Sequence[Taken], first: Sequence[Taken]) -> Row:
    """RATIOS of a kind to the first, and its median seconds_per_step and number of rounds.

    Medians over the rounds: of wall times with quartiles, and of processor times, which other programs on the machine
    disturb less.
    """
    pairs = list(zip(own, first, strict=True))
    ratios = [one.seconds / other.seconds for one, other in pairs]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    processor = statistics.median(one.processor / other.processor for one, other in pairs)
    return {
        **dict(zip(RATIOS, (median, low, high, processor), strict=True)),
        "seconds_per_step": statistics.median(one.seconds for one in own),
        "rounds": len(own),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
