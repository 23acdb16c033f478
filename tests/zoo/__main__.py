"""`make zoo`: every fault and every healthy run, one after the other, as a table."""

from __future__ import annotations

import sys
import time

from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.lives import Fault, Outcome, life


def verdict(fault: Fault, outcome: Outcome) -> tuple[str, bool]:
    """A row of the table, and whether the right cause was said, with nothing untrue before or beside it."""
    step, right = next(((at, text) for at, text in outcome.said if fault.cause in text), (0, ""))
    # The self-check tells what it has seen, alarms what it comes from.
    causes = [text for at, text in outcome.said if at <= step and not text.startswith("self-check")]
    if not right or not all(any(one in text for one in (fault.cause, *fault.companions)) for text in causes):
        return f"{fault.name} | {outcome.said[:3] or 'not found'} | | no", False
    by = "self-check" if right.startswith("self-check") else "resume" if fault.resumes_after else "alarm"
    return f"{fault.name} | {by}: {right.removeprefix('self-check: ')[:90]} | {step} | yes", True


def main(only: str = "") -> int:
    wrong = 0
    print("fault | found by | after step | right cause")
    for fault in FAULTS:
        if only in fault.name:
            row, is_right = verdict(fault, life(fault, fault.concerns))
            wrong += not is_right
            print(row, flush=True)
    print("\nhealthy run | alarms | last losses")
    for number, (name, concerns) in enumerate(HEALTHY.items()):
        if only in name:
            started = time.monotonic()
            outcome = life(None, concerns, text=number)
            wrong += bool(outcome.said)
            losses = {key: round(value, 2) for key, value in outcome.figures.items() if key.endswith("_loss")}
            print(f"{name} | {outcome.said or 'none'} | {losses} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{len(FAULTS)} faults and {len(HEALTHY)} healthy runs, {wrong} of them wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
