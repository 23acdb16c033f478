"""What the operators are meant to reach on one H200, and whether the rows of a run show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Row

LEAST_COPY_PERCENT = 85.0
LEAST_ATTENTION = {"forward": 320.0, "backward": 280.0}
"""TFLOP/s at head dimension 64 in samples of 512, with bias, dropout and packing."""
LEAST_HEAD_PERCENT = 65.0
LEAST_HEAD_MEMORY = 5.0


@dataclass(frozen=True)
class Verdict:
    """A target and the worst value of all rows that speak of it; None where none does."""

    target: str
    value: float | None
    limit: float
    at: str = ""

    @property
    def result(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.limit else "missed"

    def row(self) -> Row:
        value = "" if self.value is None else self.value
        return {"target": self.target, "limit": self.limit, "worst": value, "at": self.at, "result": self.result}


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every target, in the issue's order. Rows that did not run or gave wrong values say nothing for us."""
    good = [row for row in rows if row["status"] == "ok" and row.get("check", "ok") == "ok"]
    found = []
    for operator in ("layer_norm", "softmax_dropout"):
        for phase in ("forward", "backward"):
            name = f"{operator} {phase}, % of copy bandwidth"
            found.append(_least(name, LEAST_COPY_PERCENT, _ours(good, operator), _number(f"{phase}_percent")))
    attention = [row for row in _ours(good, "attention") if row["head_dim"] == 64 and row["is_uniform"]]
    for phase, limit in LEAST_ATTENTION.items():
        found.append(_least(f"attention {phase}, TFLOP/s", limit, attention, _number(f"{phase}_rate")))
    for rival in ("flex", "flex_table", "sdpa"):
        for phase in ("forward", "backward"):
            name = f"attention {phase}, speed to {rival}"
            found.append(_least(name, 1.0, _ours(good, "attention"), _ratio(good, rival, f"{phase}_ms")))
    head = _ours(good, "linear_cross_entropy")
    name = "linear_cross_entropy"
    found.append(_least(f"{name}, % of matrix rate", LEAST_HEAD_PERCENT, head, _number("both_percent")))
    found.append(_least(f"{name}, speed to eager", 1.0, head, _ratio(good, "eager", "both_ms")))
    found.append(_least(f"{name}, memory of eager", LEAST_HEAD_MEMORY, head, _ratio(good, "eager", "peak_mb")))
    return found


Value = Callable[[Row], float | None]


def _ours(rows: Sequence[Row], operator: str) -> list[Row]:
    return [row for row in rows if row["operator"] == operator and row["contestant"] == "ours"]


def _number(column: str) -> Value:
    return lambda row: row.get(column)


def _ratio(rows: Sequence[Row], rival: str, column: str) -> Value:
    """The rival's figure by ours at the same size."""
    others: dict[Any, Row] = {_place(row): row for row in rows if row["contestant"] == rival}

    def value(row: Row) -> float | None:
        other = others.get(_place(row), {}).get(column)
        return other / row[column] if other and row.get(column) else None

    return value


def _place(row: Row) -> tuple[Any, ...]:
    return row["operator"], row["preset"], row["size"]


def _least(name: str, limit: float, rows: Sequence[Row], value: Value) -> Verdict:
    known = [(number, row["size"]) for row in rows if (number := value(row)) is not None]
    if not known:
        return Verdict(name, None, limit)
    worst, size = min(known)
    return Verdict(name, worst, limit, size)
