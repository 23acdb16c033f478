"""One small attention and one small vocabulary head, forward and backward: what a memory checker is run on.

compute-sanitizer --error-exitcode 1 python -m benchmarks.memory_check
"""

from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.operators import cases, errors, wrong
from metro_megatron.cli.command_line import run_tool

OPERATORS = ("attention", "linear_cross_entropy")


@dataclass(frozen=True)
class Options:
    """Where."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a trial at tiny sizes."""


def main(options: Options) -> int:
    """Run both forward and backward at a small size whose tiles end in the middle, and compare with float64.

    Exit codes: 0 values are right, 1 they are not.
    """
    device, result = torch.device(options.device), 0
    for name in OPERATORS:
        case = next(case for case in cases(options.device == "cpu") if case.operator == name)
        bad = wrong(errors(case, device))
        print(f"{name} on {device.type}: {', '.join(bad) or 'right'}")
        result |= bool(bad)
    return result


if __name__ == "__main__":
    run_tool(main)
