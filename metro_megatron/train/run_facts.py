"""What a run has read, cost and learned, for the model card of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metro_megatron.cli.options import flatten, options_of
from metro_megatron.config.schema import MAY_CHANGE, Config
from metro_megatron.data.manifest import DatasetPaths, read_manifest
from metro_megatron.hf.card import PRETRAINING
from metro_megatron.plan.flops import Amount, model_flops
from metro_megatron.train.curves import Run

COUNTS = ("step", "consumed_samples", "seen_tokens", "skipped_steps")
"""Of progress.json."""
CURVE_POINTS = 10


def run_sections(iteration: Path, config: Config) -> dict[str, object]:
    """Sections of the card of a checkpoint: pretraining, data, configuration, training curve.

    What its folder does not tell, that of an average for instance, is left out.
    """
    path, sections = iteration / "progress.json", {}
    lines: list[dict[str, float]] = []
    progress = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    counts = {name.replace("_", " "): progress[name] for name in COUNTS if name in progress}
    if len(counts) == len(COUNTS):
        if (iteration.parent / "metrics.jsonl").is_file():
            lines = [line for line in Run.read(iteration.parent).training if line["step"] <= progress["step"]]
        end = {**progress, "consumed_tokens": progress["seen_tokens"]}
        if "flops" in progress:
            counts["flops"] = progress["flops"]
        elif "branch" not in progress:  # an earlier release's; of a branch the lines of its parent are missing
            counts["flops"] = run_flops(config, [*lines, end])
    if counts:
        sections[PRETRAINING] = counts
    return {
        **sections,
        "data": data_rows(config),
        "configuration": changed_options(config),
        "training curve": curve(lines),
    }


def run_flops(config: Config, lines: Sequence[Mapping[str, float]]) -> float:
    """Model FLOPs up to the last line, each stretch between lines with its phase and its mean length of a sample.

    Lengths are not all equal, so attention, which grows with their squares, is counted a little too low.
    """
    phases, total, before = config.by_phase, 0.0, {"consumed_samples": 0.0, "consumed_tokens": 0.0}
    for line in lines:
        samples, tokens = (line[name] - before[name] for name in ("consumed_samples", "consumed_tokens"))
        if samples > 0:
            phase = phases[config.phase_at(int(line["step"]) - 1)]
            total += model_flops(phase, Amount.of_samples(samples, tokens / samples))
        before = dict(line)
    return total


def data_rows(config: Config) -> list[dict[str, object]]:
    """Every source of every dataset with its documents and tokens, as far as the manifests are where they were."""
    rows: list[dict[str, object]] = []
    weights: list[object] = [*config.data.weights] or ["by its samples"] * len(config.data.train)
    for prefix, weight in zip(config.data.train, weights, strict=True):
        name = {"dataset": Path(prefix).name, "weight": weight}
        if not DatasetPaths(prefix).manifest.is_file():
            rows.append({**name, "source": "", "files": "", "documents": "", "tokens": ""})
            continue
        for source in read_manifest(prefix).sources:
            files = ", ".join(file.name for file in source.files[:3]) + (", ..." if len(source.files) > 3 else "")
            counts = {"documents": source.documents, "tokens": source.tokens}
            rows.append({**name, "source": source.name, "files": files, **counts})
    return rows


def changed_options(config: Config) -> dict[str, object]:
    """Options that are not METRO's defaults and say what the run was, not where."""
    values, defaults = flatten(config), flatten(Config())
    return {
        option.name: values[option.name]
        for option in options_of(Config)
        if MAY_CHANGE not in option.marks and values[option.name] != defaults[option.name]
    }


def curve(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The losses of about CURVE_POINTS log lines, in even distances."""
    if not lines:
        return []
    names = [name for name in lines[-1] if name == "loss" or name.endswith("_loss")]
    count = min(CURVE_POINTS, len(lines))
    chosen = [lines[round((number + 1) * len(lines) / count) - 1] for number in range(count)]
    return [
        {"step": line["step"], "tokens": line["consumed_tokens"], **{name: line.get(name, "") for name in names}}
        for line in chosen
    ]
