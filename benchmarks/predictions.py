"""What was predicted before anything ran on a GPU, and how what is measured compares with it.

docs/benchmarks/predictions.csv was committed before the first run; docs/benchmarks.md says how it was counted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.results import Row
from metro_megatron.plan.gpus import GPUS

PREDICTIONS = ROOT / "docs" / "benchmarks" / "predictions.csv"
STEP = "step"
"""Stands for the operator where a whole step was predicted."""


@dataclass(frozen=True)
class Prediction:
    """A figure of a row, on one kind of GPU, lies between low and high."""

    operator: str
    preset: str
    contestant: str
    """Of the operator; of a step, which operators are fused."""
    figure: str
    """Column of the row."""
    low: float
    high: float
    basis: str
    """counted: instructions and bytes of this GPU; scaled: from another GPU or size."""

    def verdict(self, measured: float) -> str:
        return "below" if measured < self.low else "above" if measured > self.high else "inside"


def read_predictions(device: str, path: Path = PREDICTIONS) -> list[Prediction]:
    """Those for a GPU by the driver's name; none where it is not known."""
    kind = next((kind for kind, gpu in GPUS.items() if device in gpu.devices), "")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["device"] == kind]
    return [
        Prediction(
            operator=row["operator"],
            preset=row["preset"],
            contestant=row["contestant"],
            figure=row["figure"],
            low=float(row["low"]),
            high=float(row["high"]),
            basis=row["basis"],
        )
        for row in rows
    ]


def beside_predictions(rows: Iterable[Row], predictions: Iterable[Prediction]) -> list[Row]:
    """A line for every prediction that a row of operators or of steps speaks of; wrong values do not."""
    good = [row for row in rows if row["status"] == "ok" and row.get("check", "ok") == "ok"]
    measured = {
        (row.get("operator", STEP), row["preset"], row.get("contestant") or row["fused"]): row for row in reversed(good)
    }
    found = []
    for one in predictions:
        value = measured.get((one.operator, one.preset, one.contestant), {}).get(one.figure)
        if value is None:
            continue
        what = one.operator if one.contestant in ("ours", "all") else f"{one.operator} ({one.contestant})"
        found.append(
            {
                "what": what,
                "preset": one.preset,
                "figure": one.figure,
                "predicted": f"{one.low:g} to {one.high:g}",
                "measured": value,
                "verdict": one.verdict(value),
                "basis": one.basis,
            }
        )
    return found
