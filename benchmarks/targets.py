"""What the operators are meant to reach on one H100 or H200, why not more, and whether the rows of a run show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import NO_DROPOUT
from benchmarks.results import Row

LEAST_COPY_PERCENT = 85.0
COPY_LIMIT = "100; by instructions today's LayerNorm reaches 80 forward, 68 backward"
LEAST_ATTENTION = {"forward": 200.0, "backward": 180.0}
"""TFLOP/s at head dimension 64 in samples of 512, with bias, dropout and packing."""
ATTENTION_LIMIT = {
    "forward": "184 today: bias and dropout take 37 instructions a score; 504 with 16",
    "backward": "176 today: 103 instructions a score; 424 with 47; FlashAttention 3 without both: 272",
}
LEAST_HEAD_PERCENT = {"base": 50.0, "xxl": 65.0}
HEAD_LIMIT = "75 of four products, less two passes over all logits; 52 at base with three products"
LEAST_HEAD_MEMORY = 5.0


@dataclass(frozen=True)
class Verdict:
    """A target and the worst value of all rows that speak of it; None where none does."""

    target: str
    value: float | None
    least: float
    limit: str = ""
    """What the physics allow, where it is known: docs/benchmarks.md says how it was counted."""
    at: str = ""

    @property
    def result(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.least else "missed"

    def row(self) -> Row:
        worst = "" if self.value is None else self.value
        return {
            "target": self.target,
            "least": self.least,
            "worst": worst,
            "at": self.at,
            "result": self.result,
            "limit": self.limit,
        }


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every target. Rows that did not run or gave wrong values say nothing for us."""
    good = [row for row in rows if row["status"] == "ok" and row.get("check", "ok") == "ok"]
    found = []
    for operator in ("layer_norm", "softmax_dropout"):
        for phase in ("forward", "backward"):
            name, limit = f"{operator} {phase}, % of copy bandwidth", COPY_LIMIT if operator == "layer_norm" else ""
            found.append(_least(name, LEAST_COPY_PERCENT, _ours(good, operator), _number(f"{phase}_percent"), limit))
    attention = [row for row in _ours(good, "attention") if row["head_dim"] == 64 and row["is_uniform"]]
    for phase, least in LEAST_ATTENTION.items():
        name = f"attention {phase}, TFLOP/s"
        found.append(_least(name, least, attention, _number(f"{phase}_rate"), ATTENTION_LIMIT[phase]))
    # FlexAttention has no dropout: it is compared with ours without.
    for rival, own in (("flex", NO_DROPOUT), ("flex_table", NO_DROPOUT), ("sdpa", "ours")):
        for phase in ("forward", "backward"):
            name, ours = f"attention {phase}, speed to {rival}", _of(good, "attention", own)
            found.append(_least(name, 1.0, ours, _ratio(good, rival, f"{phase}_ms")))
    head = _ours(good, "linear_cross_entropy")
    for preset, least in LEAST_HEAD_PERCENT.items():
        of_preset = [row for row in head if row["preset"] == preset]
        name = f"linear_cross_entropy of {preset}, % of matrix rate"
        found.append(_least(name, least, of_preset, _number("both_percent"), HEAD_LIMIT))
    found.append(_least("linear_cross_entropy, speed to eager", 1.0, head, _ratio(good, "eager", "both_ms")))
    name = "linear_cross_entropy, memory of eager"
    found.append(_least(name, LEAST_HEAD_MEMORY, head, _ratio(good, "eager", "peak_mb")))
    return found


Value = Callable[[Row], float | None]


def _ours(rows: Sequence[Row], operator: str) -> list[Row]:
    return _of(rows, operator, "ours")


def _of(rows: Sequence[Row], operator: str, contestant: str) -> list[Row]:
    return [row for row in rows if row["operator"] == operator and row["contestant"] == contestant]


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


def _least(name: str, least: float, rows: Sequence[Row], value: Value, limit: str = "") -> Verdict:
    known = [(number, row["size"]) for row in rows if (number := value(row)) is not None]
    if not known:
        return Verdict(name, None, least, limit)
    worst, size = min(known)
    return Verdict(name, worst, least, limit, size)
