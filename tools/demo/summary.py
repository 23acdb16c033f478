"""What came out of the demonstration: a table, and summary.json for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from metro_megatron.cli.command_line import run_tool
from metro_megatron.train.curves import Run

MLM_MARGIN = 1.0
"""Nats that the held-out MLM loss must lie below the unigram loss."""
LOWEST_AUC = 0.6

INTRINSIC = (
    "aux_loss",
    "aux_accuracy",
    "unigram_loss",
    "unigram_accuracy",
    "clm_loss",
    "clm_accuracy",
    "rtd_loss",
    "rtd_trivial_loss",
    "rtd_auc",
    "replace_rate",
    "replace_accuracy",
    "non_replace_accuracy",
)
"""Figures of tools/evaluate.py that are passed on."""


@dataclass(frozen=True)
class Options:
    """Of what."""

    root: str
    """Output folder of the demonstration."""


def main(options: Options) -> None:
    """Collect the results of all stages into summary.json and print them as a table."""
    folder = Path(options.root)
    summary = collect(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(table(summary))
    print(next_steps(folder))


def collect(folder: Path) -> dict[str, Any]:
    """Everything summary.json holds, from the files of the earlier stages."""
    evaluation = _read(folder / "evaluation.json")
    counts = _read(folder / "text" / "counts.json")
    run = Run.read(folder / "pretraining")
    classifiers = {
        start: [_read(path) for path in sorted(folder.glob(f"finetuning/{start}-*/metrics.json"))]
        for start in ("pretrained", "random")
    }
    accuracies = {start: [one["accuracy"] for one in runs] for start, runs in classifiers.items()}
    recipe = classifiers["pretrained"][0]["recipe"]
    spans = read_spans(folder / "begun.txt")
    stage_seconds = {stage: covered(found) for stage, found in spans.items()}
    # An interrupted attempt has left no span, but what it did is in the run's figures.
    resumed = max(0.0, run.training[-1]["consumed_tokens"] / run.tokens_per_second() - stage_seconds["pretraining"])
    stage_seconds["pretraining"] += resumed
    return {
        **{name: evaluation[name] for name in INTRINSIC},
        "pretrained_accuracy": accuracies["pretrained"],
        "random_init_accuracy": accuracies["random"],
        "tfidf_accuracy": _read(folder / "baseline.json")["tfidf_accuracy"],
        "tokens_seen": int(run.training[-1]["consumed_tokens"]),
        "tokens_per_second": run.tokens_per_second(),
        "steps": int(run.training[-1]["step"]),
        "seconds": covered(span for found in spans.values() for span in found) + resumed,
        "stage_seconds": stage_seconds,
        "overlaps_removed": counts["overlaps"],
        "num_train_sentences": counts["train"],
        "num_test_sentences": counts["test"],
        "finetuning_epochs": recipe["epochs"],
        "finetuning_learning_rate": recipe["learning_rate"],
        "finetuning_batch_size": recipe["batch_size"],
        "verdict": verdict(accuracies["pretrained"], accuracies["random"]),
    }


def read_spans(path: Path) -> dict[str, list[tuple[float, float]]]:
    """When targets of each stage began and ended (the time of their file), from the lines that demo.mk leaves.

    Of a target that was begun several times the last counts; one whose file is not there has no end.
    """
    begun = {target: (stage, float(begin)) for begin, stage, target in map(str.split, path.read_text().splitlines())}
    spans: dict[str, list[tuple[float, float]]] = {}
    for target, (stage, begin) in begun.items():
        if Path(target).exists():
            spans.setdefault(stage, []).append((begin, Path(target).stat().st_mtime))
    return spans


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    seconds, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        seconds += max(0.0, end - max(begin, last))
        last = max(last, end)
    return seconds


def verdict(pretrained: Sequence[float], random: Sequence[float]) -> str:
    """What the accuracies over seeds say about pretraining; claims nothing where their ranges overlap."""
    gain = median(pretrained) - median(random)
    points = f"{100 * gain:+.1f} points between the medians"
    if min(pretrained) > max(random):
        return f"Pretraining helped: every pretrained run is better than every one from random weights ({points})."
    if max(pretrained) < min(random):
        return (
            f"At this budget pretraining does not yet help: every pretrained run is worse than every one from random "
            f"weights ({points})."
        )
    ranges = [f"{100 * min(values):.1f} to {100 * max(values):.1f}" for values in (pretrained, random)]
    return (
        f"At this budget pretraining does not yet help: over the seeds, runs from pretrained weights reach {ranges[0]} "
        f"and those from random weights {ranges[1]}, which overlap ({points})."
    )


def table(summary: dict[str, Any]) -> str:
    """The closing table."""
    s = summary
    margin = s["unigram_loss"] - s["aux_loss"]
    distance = f"{abs(margin):.2f} {'below' if margin >= 0 else 'above'}, at least {MLM_MARGIN:.2f} below"
    rows = [
        ("held-out reviews", "model", "trivial", ""),
        _row("MLM loss (nats)", s["aux_loss"], s["unigram_loss"], _goal(margin >= MLM_MARGIN, distance)),
        _row("MLM accuracy", s["aux_accuracy"], s["unigram_accuracy"]),
        _row("CLM loss (nats)", s["clm_loss"], s["unigram_loss"]),
        _row("CLM accuracy", s["clm_accuracy"], s["unigram_accuracy"]),
        _row("RTD loss (nats)", s["rtd_loss"], s["rtd_trivial_loss"]),
        _row("RTD AUC", s["rtd_auc"], 0.5, _goal(s["rtd_auc"] >= LOWEST_AUC, f"at least {LOWEST_AUC:.2f}")),
        ("replace rate", f"{s['replace_rate']:.3f}", "", ""),
        ("replaced tokens found", f"{s['replace_accuracy']:.3f}", "0", ""),
        ("original tokens kept", f"{s['non_replace_accuracy']:.3f}", "1", ""),
        ("", "", "", ""),
        ("fine-tuning, accuracy", "median", "seeds", ""),
        _accuracies("from pretrained weights", s["pretrained_accuracy"]),
        _accuracies("from random weights", s["random_init_accuracy"]),
        ("TF-IDF, for scale", f"{100 * s['tfidf_accuracy']:.1f}", "", ""),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {other:<{widths[2]}}  {note}".rstrip()
        for name, value, other, note in rows
    ]
    minutes = s["seconds"] / 60
    return "\n".join(
        [
            "",
            *lines,
            "",
            *textwrap.wrap(s["verdict"], 100, initial_indent="  ", subsequent_indent="  "),
            f"  Each fine-tuning run: {s['num_train_sentences']:,} sentences, epochs: {s['finetuning_epochs']}, "
            f"batches of {s['finetuning_batch_size']}, learning rate {s['finetuning_learning_rate']:g}; "
            f"{s['num_test_sentences']:,} test sentences.",
            f"  {s['overlaps_removed']} sentences that share six words in a row with a review were removed first.",
            f"  Pretraining: {s['steps']:,} steps, {s['tokens_seen'] / 1e6:.2f} M tokens, "
            f"{s['tokens_per_second']:,.0f} tokens/s. All stages together: {minutes:.1f} minutes.",
        ]
    )


def next_steps(folder: Path) -> str:
    """What to look at and to run after the demonstration."""
    lines = [
        "",
        f"made {folder}/summary.json, {folder}/curves.png and the model {folder}/model",
        "next:",
        f"  tensorboard --logdir {folder}/pretraining/tensorboard",
        f"  python tools/finetune.py --model {folder}/model --task classification --train_file TRAIN.csv "
        "--validation_file VALIDATION.csv --output DIR",
    ]
    if folder.name != "learn":
        lines.append("  make learn    the same path with enough tokens to help: a GPU, or a night")
    return "\n".join(lines)


def _row(name: str, value: float, trivial: float, note: str = "") -> tuple[str, str, str, str]:
    return name, f"{value:.3f}", f"{trivial:.3f}", note


def _goal(is_reached: bool, what: str) -> str:
    return f"{what}: {'goal reached' if is_reached else 'goal MISSED'}"


def _accuracies(name: str, values: Sequence[float]) -> tuple[str, str, str, str]:
    return name, f"{100 * median(values):.1f}", " ".join(f"{100 * value:.1f}" for value in values), ""


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_tool(main)
