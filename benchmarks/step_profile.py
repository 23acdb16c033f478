"""Where the time of whole steps goes: a trace for a viewer, the largest kernels, the share without any."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import Row

LARGEST = 15


class Interval(NamedTuple):
    name: str
    begin: float
    end: float


def profile_steps(action: Callable[[], object], device: torch.device, path: Path) -> dict[str, Any]:
    """Run action once and write its trace to `path` (.json or .json.gz).

    Returns `largest`, rows of the largest kernels (on the CPU: operators, by their own time), and `gap_percent`, the
    share of the time between the first and the last kernel in which none ran; None on the CPU.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        action()
        if is_cuda:
            torch.cuda.synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if not is_cuda:
        totals = {one.key: (one.self_cpu_time_total, one.count) for one in profiler.key_averages()}
        return {"largest": largest(totals), "gap_percent": None}
    intervals = [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return {"largest": largest(sums(intervals)), "gap_percent": gap_percent(intervals)}


def sums(intervals: Iterable[Interval]) -> dict[str, tuple[float, int]]:
    """Microseconds and number of intervals, by name."""
    found: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, begin, end in intervals:
        time, count = found[name]
        found[name] = time + end - begin, count + 1
    return found


def largest(totals: dict[str, tuple[float, int]]) -> list[Row]:
    """The LARGEST names by time, with their share of the time of all."""
    everything = sum(time for time, _ in totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda one: -one[1][0])[:LARGEST]
    return [
        {"percent": 100 * time / everything, "ms": time / 1e3, "count": count, "name": name[:90]}
        for name, (time, count) in ordered
    ]


def gap_percent(intervals: Iterable[Interval]) -> float:
    """Share of the span of all intervals that none covers; they may overlap."""
    ordered = sorted(intervals, key=lambda one: one.begin)
    if not ordered:
        return 100.0
    covered, reached = 0.0, ordered[0].begin
    for _, begin, end in ordered:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 100 * (1 - covered / max(reached - ordered[0].begin, 1e-9))
