"""What is done to a run: drawn by seed and number, so that the same storm can come again."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metro_megatron.errors import UserError

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data 2": (2, ()),
    "alone": (1, ()),
    "tensor 2": (2, ("--parallel.tensor_model_parallel_size", "2")),
    "pipeline 2": (2, ("--parallel.pipeline_model_parallel_size", "2")),
}
"""Processes and options."""

OF_RANKS = ("kill rank", "stop rank", "pause rank")
OF_FILES = ("kill writer", "ENOSPC", "EIO")
"""These need the shim."""
OTHERS = ("kill tree", "kill torchrun", "SIGTERM", "SIGHUP", "flipped bit", "clock step")
TOGETHER = ("stop rank", "kill torchrun")
"""These are nothing for a process alone."""

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink")
"""In the order of shim.c, which begins with 1."""
MOST_CALLS = {"open": 590, "write": 1760, "fsync": 112, "rename": 39, "mkdir": 22, "unlink": 70}
"""How many the process of a run that nothing disturbs does in its folder; earlier ones are drawn more often, as most
attempts are no whole run."""
MOST_DAYS = 30
"""That a clock is set forward, or back."""


@dataclass(frozen=True)
class Injection:
    """Calls of one kind, in the run folder, that fail or kill."""

    call: str
    number: int
    """The first of them, counted from the start of the process."""
    times: int
    error: int
    """An errno; 0 kills."""


@dataclass(frozen=True)
class Fault:
    """One disturbance of one attempt."""

    kind: str
    layout: str
    moment: float
    """When, as a share of the seconds that an undisturbed run takes; for what happens to a rank, of those after its
    start."""
    rest: float
    """How long the run is then left alone, likewise, before it is told to end."""
    rank: int
    """Of those that are there: whose remainder."""
    place: float
    """In a checkpoint: which file, and where in it."""
    seconds: int
    """That a clock is set."""
    injection: Injection | None

    @property
    def num_processes(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def victim(self) -> int:
        return self.rank % self.num_processes


def draw(seed: int, number: int, layouts: Sequence[str], has_shim: bool) -> Fault:
    """The fault of a number; kinds come equally often."""
    kinds = (*OF_RANKS, *OTHERS, *(OF_FILES if has_shim else ()))
    turn, place = divmod(number, len(kinds))
    kind = str(np.random.default_rng([seed, turn]).permutation(kinds)[place])
    rng = np.random.default_rng([seed, turn, place])
    possible = [layout for layout in layouts if LAYOUTS[layout][0] > 1 or kind not in TOGETHER] or ["data 2"]
    return Fault(
        kind=kind,
        layout=str(rng.choice(possible)),
        moment=float(rng.uniform(0, 0.5)),
        rest=float(rng.uniform(0.3, 0.8)),
        rank=int(rng.integers(2)),
        place=float(rng.uniform()),
        seconds=int(rng.integers(-MOST_DAYS, MOST_DAYS + 1)) * 86_400 + int(rng.integers(1, 86_400)),
        injection=_injection(kind, rng) if kind in OF_FILES else None,
    )


def _injection(kind: str, rng: np.random.Generator) -> Injection:
    call = str(rng.choice(CALLS))
    error = {"kill writer": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}[kind]
    number = 1 + int(rng.uniform() ** 3 * MOST_CALLS[call])
    return Injection(call, number, times=int(rng.choice([1, 3, 1_000_000])), error=error)


class Shim:
    """The library between the run's processes and the C library; they have it from this one."""

    def __init__(self, folder: Path, mark: Path):
        """folder: below which calls fail. mark: the file that is made, with the path in it, when one does."""
        self.folder = folder
        self.mark = mark

    @staticmethod
    def build(path: Path) -> None:
        """Compile it. Raises UserError where there is no C compiler."""
        source = Path(__file__).with_name("shim.c")
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", path, source, "-ldl"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"{source} cannot be compiled ({error}): install a C compiler, or give --shim false"
            ) from error

    @staticmethod
    def is_loaded() -> bool:
        return hasattr(ctypes.CDLL(None), "storm_arm")

    def arm(self, injection: Injection) -> None:
        """From here on calls of this process fail as told."""
        call = CALLS.index(injection.call) + 1
        number, times = ctypes.c_long(injection.number), ctypes.c_long(injection.times)
        below, mark = os.fsencode(self.folder), os.fsencode(self.mark)
        ctypes.CDLL(None).storm_arm(below, mark, call, number, times, injection.error)


def step_clock(after: float, seconds: float, mark: Path) -> None:
    """After some seconds, set the clock that this process's Python reads."""
    read = time.time

    def step() -> None:
        time.time = lambda: read() + seconds  # type: ignore[assignment]
        mark.write_text(f"by {seconds} s")

    timer = threading.Timer(after, step)
    timer.daemon = True
    timer.start()


def flip_bit(folder: Path, place: float) -> Path:
    """Flip a bit of a checkpoint's files, which lie one behind the other."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    bits = [8 * path.stat().st_size for path in files]
    # A file first: a bit of all would nearly always be one of a tensor.
    number, place = divmod(place * len(files), 1)
    path, bit = files[int(number)], int(place * bits[int(number)])
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path


SIGNALS = {
    "kill rank": signal.SIGKILL,
    "stop rank": signal.SIGSTOP,
    "pause rank": signal.SIGSTOP,
    "kill tree": signal.SIGKILL,
    "kill torchrun": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
}
