"""One small attention and one small vocabulary head, forward and backward: what a memory checker is run on.

    compute-sanitizer --error-exitcode 1 python -m benchmarks.memory_check

Exit codes: 0 values are right, 1 they are not.
"""

import sys

import torch

from benchmarks.operators import cases, errors, wrong

OPERATORS = ("attention", "linear_cross_entropy")


def main() -> int:
    """Compare both with float64 at a small size, with tiles that end in the middle."""
    is_cuda = torch.cuda.is_available()
    device, result = torch.device("cuda" if is_cuda else "cpu"), 0
    for name in OPERATORS:
        case = next(case for case in cases(is_trial=not is_cuda) if case.operator == name)
        bad = wrong(errors(case, device))
        print(f"{name} on {device.type}: {', '.join(bad) or 'right'}")
        result |= bool(bad)
    return result


if __name__ == "__main__":
    sys.exit(main())
