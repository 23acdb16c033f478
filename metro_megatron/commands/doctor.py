"""One page about this machine: what it has for pretraining, what works, what is missing, and what mends it."""

import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from metro_megatron.cli.command_line import pretraining_command, run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.machine.finding import Finding


@dataclass(frozen=True)
class Options:
    """What the machine is wanted for."""

    gpus: Annotated[int, at_least(0)] = 0
    """GPUs that must work; 0: those that the driver knows, and without any the CPU."""
    output: str = ""
    """A run's folder, to see whether its storage can be written, how fast, and whether other machines may see it."""


def main(options: Options) -> int:
    """Say what this machine can do for a run, in at most a minute; nothing is changed.

    A scheduler may ask before a job: `metro-doctor --gpus 8 --output /shared/runs/x || drain`. Exit codes: 0 a run can
    be trained as asked, 1 it cannot, with what is wrong, 2 a mistake in the options.
    """
    print(f"{socket.gethostname()}: {platform.platform()}, Python {platform.python_version()}")
    fatal = []
    counts = {"works": 0, "absent": 0, "wrong": 0}
    for finding in _findings(options):
        print(page_lines(finding), flush=True)
        counts[finding.state] += 1
        if finding.is_fatal:
            fatal.append(finding.subject)
    print(f"{counts['works']} work, {counts['absent']} are absent, {counts['wrong']} are wrong")
    if fatal:
        print(f"this machine cannot train as asked: {', '.join(fatal)}")
        return 1
    print(f"this machine can train; next:\n  {pretraining_command()} ...")
    return 0


def page_lines(finding: Finding) -> str:
    """What is printed of a finding."""
    shown = f"{'!' if finding.is_fatal else ' '} {finding.state:7} {finding.subject}: {finding.found}"
    if finding.state == "works":
        return shown
    return shown + "".join(
        f"\n            {label}: {text}" for label, text in (("cost", finding.cost), ("mend", finding.remedy)) if text
    )


def _findings(options: Options) -> Iterator[Finding]:
    # Late: torch loads for seconds, and the page's first line shall stand before.
    from metro_megatron.machine.driver import DriverError, driver, driver_lines
    from metro_megatron.machine.software import packages, torch_fault
    from metro_megatron.machine.system import system

    try:
        known = len(driver_lines())
    except DriverError:
        known = 0
    wanted = options.gpus or known
    yield from packages(wants_gpu=wanted > 0)
    if wanted:
        yield from driver()
    if known and wanted and not torch_fault():
        from metro_megatron.machine.gpus import gpus

        yield from gpus(wanted)
    if not wanted:
        cost = "training on the CPU: for demos and tests"
        yield Finding("GPUs", "absent", "the driver knows none", cost, "a machine with GPUs; in a container --gpus all")
    yield from system(wanted, options.output)


run = partial(run_tool, main)
"""The console script."""
