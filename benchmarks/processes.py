"""Commands measured from outside: wall time, processor time and memory of the whole tree."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metro_megatron.errors import UserError

ROOT = Path(__file__).parents[1]
"""Of the checkout; the tools lie below it."""


_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
wall, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print("\\n" + json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6]), end="")
sys.exit(code if code >= 0 else 128 - code)
"""
"""A small process between: a command would inherit the peak memory of the process that starts it."""


@dataclass(frozen=True)
class Measured:
    """A command that succeeded."""

    wall_s: float
    cpu_s: float
    """Of the process and all it waited for."""
    max_rss_mb: float
    """Of the largest process."""
    output: str
    """Standard output."""


def run_measured(command: Sequence[str | Path], folder: Path = ROOT, environment: Mapping[str, str] = {}) -> Measured:
    """Run a command in `folder` to its end; this checkout can be imported. Raises UserError if it fails."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    launched = [sys.executable, "-S", "-c", _LAUNCHER, *map(str, command)]
    result = subprocess.run(launched, cwd=folder, env=variables, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed with {result.returncode}:\n{result.stderr[-1000:]}")
    output, _, figures = result.stdout.rpartition("\n")
    wall_s, cpu_s, max_rss_mb = json.loads(figures)
    return Measured(wall_s, cpu_s, max_rss_mb, output)


def python(*arguments: str | Path) -> list[str | Path]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]
