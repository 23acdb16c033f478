"""One row of the benchmark of the fused operators: an operator, a size, a contestant; and which rows there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import Ceilings, Clock, measure_ceilings
from benchmarks.contestants import COMPILED, CONTESTANTS, Prepared, Unavailable
from benchmarks.figures import Work
from benchmarks.operators import DROPOUT, MEASURED, Case, cases, errors, wrong
from benchmarks.results import Row
from fused.dispatch import OPERATOR_NAMES

COLUMNS = (
    "operator", "preset", "size", "contestant", "status", "check", "forward_ms", "backward_ms", "both_ms", "unit",
    "forward_rate", "backward_rate", "both_rate", "forward_percent", "backward_percent", "both_percent", "peak_mb",
    "repetitions", "note", "formula", "hidden", "heads", "head_dim", "samples", "is_uniform", "largest_error",
)  # fmt: skip

OK, NOT_RUN = "ok", "not run"
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class OperatorRow:
    """What a row measures."""

    case: Case
    contestant: str
    seconds: float = 1.0
    """Of repetitions, for each of forward, backward and both."""

    def head(self) -> Row:
        """The columns that are known before."""
        case, work = self.case, MEASURED[self.case.operator].work(self.case)
        return {
            "operator": case.operator,
            "preset": case.preset,
            "size": case.size,
            "contestant": self.contestant,
            "unit": work.unit,
            "formula": work.formula,
            "hidden": case.hidden,
            "heads": case.heads,
            "head_dim": case.head_dim,
            "samples": len(case.lengths),
            "is_uniform": case.is_uniform,
        }


def tasks(
    operators: Sequence[str], against: Sequence[str], is_trial: bool, presets: Sequence[str] = ()
) -> list[OperatorRow]:
    """Ours at all sizes, then what starts quickly, then what compiles first: what matters most comes first.

    presets: only the sizes of these; none for all. Raises ValueError for names that do not exist.
    """
    sizes = cases(is_trial)
    known = {name for contestants in CONTESTANTS.values() for name in contestants}
    for name, given, possible in (
        ("operators", operators, set(OPERATOR_NAMES)),
        ("against", against, known - {"ours"}),
        ("presets", presets, {case.preset for case in sizes}),
    ):
        if unknown := set(given) - possible:
            raise ValueError(f"{name}: {', '.join(sorted(unknown))}; it can be {', '.join(sorted(possible))}")
    found = [
        OperatorRow(case, contestant)
        for case in sizes
        if case.operator in operators and (not presets or case.preset in presets)
        for contestant in CONTESTANTS[case.operator]
        if contestant == "ours" or contestant in against
        if contestant != "flex_table" or case.preset in ("base", "trial")
    ]
    return sorted(found, key=lambda task: (not task.contestant.startswith("ours"), task.contestant in COMPILED))


class OperatorBench:
    """Measures rows on one device; its ceilings are measured when it begins."""

    def __init__(self, device: torch.device):
        is_trial = device.type == "cpu"
        self.device = device
        self.clock = Clock(device, least=3, most=3) if is_trial else Clock(device)
        self.ceilings = measure_ceilings(self.clock)

    def row(self, task: OperatorRow) -> Row:
        """The row of a task. What goes wrong becomes its status, or its check where values are wrong."""
        row: Row = {**task.head(), "status": OK}
        try:
            if task.contestant in COMPILED:
                torch._dynamo.reset()
            if task.contestant == "ours":
                row |= self._check(task.case)
            row |= self._measure(task)
        except Unavailable as reason:
            row["status"] = f"unavailable: {reason}"
        except Exception as error:  # a contestant may raise anything; it is a row, not the end
            row["status"] = f"failed: {_one_line(error)}"
        row["is_device_lost"] = not self._recover()
        return row

    def _check(self, case: Case) -> Row:
        found = errors(case, self.device)
        bad = wrong(found)
        numbers = [error for name, error in found.items() if not name.startswith("ids")]
        return {"check": f"wrong: {', '.join(bad)}" if bad else OK, "largest_error": max(numbers)}

    def _measure(self, task: OperatorRow) -> Row:
        case, operator = task.case, MEASURED[task.case.operator]
        inputs = operator.inputs(case, self.device)
        prepared = CONTESTANTS[case.operator][task.contestant](case, inputs, DROPOUT)
        first = prepared.function()[0]
        arriving = torch.randn_like(first)
        del first

        def backward(value: torch.Tensor) -> object:
            return torch.autograd.grad(value, prepared.leaves, arriving)

        backward(_forward(prepared))  # what compiles does it here, and takes memory for that
        measure, seconds = self.clock.measure, task.seconds
        peak_mb = self.clock.peak_mb(lambda: backward(_forward(prepared)))
        times = {
            "forward": measure(lambda _: _forward(prepared), seconds=seconds),
            "backward": measure(backward, lambda: _forward(prepared), seconds=seconds),
            "both": measure(lambda _: backward(_forward(prepared)), seconds=seconds),
        }
        milliseconds = {phase: timing.median_ms for phase, timing in times.items()}
        row = figures(operator.work(case), milliseconds, self.ceilings)
        repetitions = min(timing.repetitions for timing in times.values())
        return {**row, "peak_mb": "" if peak_mb is None else peak_mb, "repetitions": repetitions, "note": prepared.note}

    def _recover(self) -> bool:
        """Free memory; whether the device still works. After a fault of a kernel nothing does in this process."""
        try:
            self.clock.synchronize()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


def _forward(prepared: Prepared) -> torch.Tensor:
    return prepared.function()[0]


def figures(work: Work, milliseconds: dict[str, float], ceilings: Ceilings) -> Row:
    """Times, rates and percent of the ceiling, by phase."""
    row: dict[str, Any] = {}
    for phase in PHASES:
        rate = work.rate(getattr(work, phase), milliseconds[phase])
        row |= {
            f"{phase}_ms": milliseconds[phase],
            f"{phase}_rate": rate,
            f"{phase}_percent": 100 * rate / ceilings.of(work.unit),
        }
    return row


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
