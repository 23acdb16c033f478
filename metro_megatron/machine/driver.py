"""What NVIDIA's driver says of the GPUs, before torch is asked."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence

from metro_megatron.machine.finding import Finding

SMI = "nvidia-smi"
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Why clocks are low, as drivers since 535 call it, and those before."""
ECC = "ecc.errors.uncorrected.volatile.total"
ASKED = ("index", "name", "driver_version", "clocks.sm", "clocks.max.sm", REASONS[0], ECC, "temperature.gpu")
SLOWED = {
    0x08: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}
"""Bits of the reasons that a machine's keeper has to look at; limits of power and idling are none."""


class DriverError(Exception):
    """The driver does not answer, and what it says instead."""


def driver_lines() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, by ASKED. Raises DriverError where it does not say it."""
    try:
        ran = _ask(ASKED)
        if ran.returncode:
            ran = _ask([REASONS[1] if name == REASONS[0] else name for name in ASKED])
    except (OSError, subprocess.SubprocessError) as error:
        raise DriverError(f"{SMI} does not run ({error})") from error
    rows = [[part.strip() for part in line.split(",")] for line in ran.stdout.splitlines()]
    if ran.returncode or not rows or any(len(row) != len(ASKED) for row in rows):
        said = " ".join(f"{ran.stdout} {ran.stderr}".split())[:200]
        raise DriverError(f"{SMI} ends with exit code {ran.returncode} and says: {said or 'nothing'}")
    return [dict(zip(ASKED, row, strict=True)) for row in rows]


def _ask(names: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [SMI, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def driver() -> Iterator[Finding]:
    """Clocks, temperatures and memory errors of every GPU."""
    try:
        lines = driver_lines()
    except DriverError as error:
        remedy = "install NVIDIA's driver; in a container, start it with the GPUs (--gpus all)"
        yield Finding("driver", "wrong", str(error), "no GPU is used", remedy, is_needed=True)
        return
    for line in lines:
        yield from _as_it_says(line)


def _as_it_says(line: dict[str, str]) -> Iterator[Finding]:
    subject = f"GPU {line['index']}"
    clock = f"{line['clocks.sm']} of {line['clocks.max.sm']} MHz, {line['temperature.gpu']} degrees"
    yield Finding(subject, "works", f"{line['name']}, driver {line['driver_version']}, {clock}")
    active = line[REASONS[0]]
    bits = int(active, 16) if active.startswith("0x") else 0
    slowed = [reason for bit, reason in SLOWED.items() if bits & bit]
    if slowed:
        cost = "all ranks wait for the slowest GPU"
        yield Finding(subject, "wrong", f"is slowed down: {', '.join(slowed)}", cost, "look at cooling and power")
    errors = line[ECC]
    if errors.isdigit() and int(errors):
        cost = "values may be wrong, and kernels fail"
        remedy = f"{SMI} --gpu-reset --id={line['index']} while nothing uses it; another machine if it comes again"
        yield Finding(subject, "wrong", f"{errors} memory errors that were not corrected", cost, remedy, is_needed=True)
