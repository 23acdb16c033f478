"""What a run of bench_gpu found, as a page that can go into docs/ as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.predictions import beside_predictions, read_predictions
from benchmarks.results import Row, shown
from metro_megatron.files import replace_text

HEAD = ("device", "driver", "torch", "cuda", "triton", "python", "commit", "date", "command")
STEPS = ("base", "large", "table5")
"""Stages that measure whole steps."""
OPERATOR_FIGURES = (
    *("operator", "size", "contestant", "forward_ms", "backward_ms", "forward_rate", "backward_rate", "unit"),
    *("both_percent", "peak_mb", "check", "status"),
)
STEP_FIGURES = (
    *("preset", "fused", "seconds_per_step", "tokens_per_s", "tflops", "mfu_percent", "peak_gb", "data_percent"),
    *("speed_gain_percent", "memory_gain_percent", "status"),
)


def write_summary(folder: Path) -> None:
    """Write folder/summary.md from the results that are there."""
    record = json.loads((folder / "stages.json").read_text())
    operators, rivals, losses, learned = (_run(folder, name) for name in ("operators", "rivals", "losses", "learn"))
    steps = {name: run for name in STEPS if (run := _run(folder, name))}
    step_rows = [row for run in steps.values() for row in run["rows"]]
    rows = [*operators.get("rows", ()), *rivals.get("rows", ()), *step_rows]
    compared = beside_predictions(rows, read_predictions(record["head"]["device"]))
    # Others are measured in the run of the rivals, and ours beside them.
    to_others = [one for one in rivals.get("targets", ()) if "speed to" in one["target"]]
    targets = [one for one in (*operators.get("targets", ()), *to_others) if one["result"] != "not measured"]
    parts = {
        "Run": [{"what": name, "is": record["head"][name]} for name in HEAD],
        "Stages": [{name: row[name] for name in ("stage", "result", "seconds", "note")} for row in record["stages"]],
        "Losses beside the CPU's": [{"loss": one["text"]} for one in losses.get("verdicts", ())],
        "Learning": [{"loss": one["text"]} for one in learned.get("verdicts", ())],
        "Beside the predictions": compared,
        "Targets": targets,
        "Operators": _columns(operators.get("rows", ()), OPERATOR_FIGURES),
        "Operators beside others": _columns(rivals.get("rows", ()), OPERATOR_FIGURES),
        "Whole steps": _columns(step_rows, STEP_FIGURES),
        **{f"Largest kernels of {name}": _kernels(run) for name, run in steps.items()},
    }
    text = "\n\n".join(f"## {title}\n\n{markdown(found)}" for title, found in parts.items() if found)
    replace_text(folder / "summary.md", f"# One GPU: {record['head']['device']}\n\n{text}\n")


def _run(folder: Path, stage: str) -> dict[str, Any]:
    """The newest run of a stage's results; empty where there are none."""
    path = folder / f"{stage}.json"
    return json.loads(path.read_text())[-1] if path.exists() else {}


def _columns(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """These columns, as far as any row has them."""
    known = [name for name in columns if any(row.get(name, "") != "" for row in rows)]
    return [{name: row.get(name, "") for name in known} for row in rows]


def _kernels(run: Mapping[str, Any]) -> list[Row]:
    profile = run.get("profile", {})
    gap = profile.get("gap_percent")
    idle = [] if gap is None else [{"percent": gap, "ms": "", "count": "", "name": "of the time no kernel ran"}]
    return [*profile.get("largest", ()), *idle]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; the columns are the first row's."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([shown(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
