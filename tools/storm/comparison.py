"""Whether a run that was disturbed is the one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metro_megatron.checkpoint.files import iteration_folder, tracked_step
from metro_megatron.checkpoint.read import StoredModel

ACROSS_LAYOUTS = 1e-6
"""Largest difference of a weight."""
OF_THE_MACHINE = {"tokens_per_second", "tflops_per_gpu", "mfu", "seconds_per_step", "data_share", "alarms"}
"""Of a line of metrics.jsonl: not of the arithmetic."""


def differences(run: Path, undisturbed: Path, is_one_layout: bool) -> list[str]:
    """What of two finished runs is not equal: weights, lines, and in one layout moments and progress, bit for bit."""
    step = tracked_step(undisturbed)
    if tracked_step(run) != step:
        return [f"ends after step {tracked_step(run)}, not {step}"]
    ours, theirs = (iteration_folder(folder, step or 0) for folder in (run, undisturbed))
    limit = 0.0 if is_one_layout else ACROSS_LAYOUTS
    problems = _of_weights(ours, theirs, limit) + _of_lines(run, undisturbed, is_one_layout)
    if is_one_layout and (ours / "progress.json").read_text() != (theirs / "progress.json").read_text():
        problems.append("progress.json, with the digest of weights and moments, differs")
    return problems


def _of_weights(ours: Path, theirs: Path, limit: float) -> list[str]:
    found, expected = (_weights(folder) for folder in (ours, theirs))
    if found.keys() != expected.keys():
        return ["other parameters"]
    furthest = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    wrong = {name: far for name, far in furthest.items() if not far <= limit}
    return [f"{len(wrong)} of {len(expected)} parameters differ, {name} by {far:.3g}" for name, far in wrong.items()][
        :1
    ]


def _weights(folder: Path) -> dict[str, Any]:
    model = StoredModel.open(folder)
    return model.read(model.stored)


def _of_lines(run: Path, undisturbed: Path, is_one_layout: bool) -> list[str]:
    """Some lines may be missing, that found no room before a process was killed; none may be another's."""
    expected = {line["step"]: line for line in _lines(undisturbed)}
    lines = _lines(run)
    if len({line["step"] for line in lines}) != len(lines):
        return ["metrics.jsonl has a step twice"]
    if 2 * len(lines) < len(expected):
        return [f"metrics.jsonl has lines of {len(lines)} steps, not of {len(expected)}"]
    names = expected[1].keys() - OF_THE_MACHINE if is_one_layout else {"digest", "consumed_tokens", "learning_rate"}
    wrong = [line["step"] for line in lines if any(line[name] != expected[line["step"]][name] for name in names)]
    return [f"lines of {len(wrong)} steps differ, the first is {wrong[0]}"] if wrong else []


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
