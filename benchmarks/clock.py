"""Medians of device time, and the two ceilings that rates are compared with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
FLUSH_BYTES = 128 << 20
"""Of each of two buffers that are copied between repetitions; more than any second-level cache."""
LONGEST_LEAD_MS = 20.0


@dataclass(frozen=True)
class Timing:
    median_ms: float
    repetitions: int


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, on random data."""

    copy_gb_per_s: float
    """Of a large copy: bytes read and written."""
    matrix_tflops: float
    """Of a large product of square matrices."""

    def of(self, unit: str) -> float:
        return self.copy_gb_per_s if unit == "GB/s" else self.matrix_tflops


class Clock:
    """Times functions on one device: CUDA events, on the CPU the wall clock.

    Before every repetition a copy between other buffers leaves the second-level cache as a stream of reads and writes
    leaves it: without the inputs, and with dirty lines to write back, as the copy that gives the ceiling. Then the
    device is kept busy until all launches are queued, so that a median is device time without the host's.
    """

    def __init__(self, device: torch.device, least: int = 20, most: int = 200):
        self.device, self.least, self.most = device, least, most
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._buffers = [torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) for _ in range(2)]
            self._cycles_per_ms = self._sleep_rate()

    def measure(
        self, timed: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None, seconds: float = 1.0
    ) -> Timing:
        """Median of timed(prepare()), prepare left out: at least `least` repetitions, more while `seconds` last."""
        for _ in range(WARM_UP):
            timed(prepare())
        lead_ms = self._host_ms(timed, prepare())
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < self.least or (len(times) < self.most and time.perf_counter() - start < seconds):
            times.append(self._once(timed, prepare(), lead_ms))
        return Timing(statistics.median(times), len(times))

    def peak_mb(self, action: Callable[[], object]) -> float | None:
        """Most memory that action has at a time beyond what was there before; None on the CPU."""
        if not self._is_cuda:
            action()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        action()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self.device)

    def _once(self, timed: Callable[[Any], object], argument: Any, lead_ms: float) -> float:
        if not self._is_cuda:
            start = time.perf_counter()
            timed(argument)
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffers[0].copy_(self._buffers[1])
        torch.cuda._sleep(int(lead_ms * self._cycles_per_ms))
        begin.record()
        timed(argument)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _host_ms(self, timed: Callable[[Any], object], argument: Any) -> float:
        """How long the device must be kept busy for the host to queue one call."""
        self.synchronize()
        start = time.perf_counter()
        timed(argument)
        host_ms = (time.perf_counter() - start) * 1e3
        self.synchronize()
        return min(1.5 * host_ms + 0.1, LONGEST_LEAD_MS)

    def _sleep_rate(self) -> float:
        """Cycles of torch.cuda._sleep in a millisecond, after a first sleep that warms up."""
        cycles, elapsed = 10_000_000, 0.0
        for _ in range(2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        return cycles / elapsed


def measure_ceilings(clock: Clock, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Copy of 1 GiB and product of side 8,192 on a GPU; on the CPU sizes that take milliseconds."""
    is_cuda = clock.device.type == "cuda"
    numbers, side = (1 << 29, 8192) if is_cuda else (1 << 22, 512)
    copied = [torch.randint(-(2**15), 2**15, (numbers,), dtype=torch.int16, device=clock.device) for _ in range(2)]
    copy = clock.measure(lambda _: copied[0].copy_(copied[1]))
    copied.clear()
    factors = [torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2)]
    product = clock.measure(lambda _: factors[0] @ factors[1])
    return Ceilings(4 * numbers / copy.median_ms / 1e6, 2 * side**3 / product.median_ms / 1e9)
