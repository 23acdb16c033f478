"""What came out of the demonstration: a table, a page for people, and summary.json for programs."""

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
from tools.demo.page import write_page

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
    """Collect the results of all stages into summary.json and demo.html, and print them as a table."""
    folder = Path(options.root)
    summary = collect(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page = {**summary, "about_tasks": about_tasks(summary)}
    write_page(folder / "demo.html", page, _read(folder / "evaluation.json")["examples"], folder / "curves.png")
    print(table(summary))
    print(next_steps(folder))


def collect(folder: Path) -> dict[str, Any]:
    """Everything summary.json holds, from the files of the earlier stages."""
    evaluation = _read(folder / "evaluation.json")
    counts = _read(folder / "text" / "counts.json")
    run = Run.read(folder / "pretraining")
    found = {
        start: [_read(path) for path in sorted(folder.glob(f"acceptability/{start}-*/metrics.json"))]
        for start in ("pretrained", "random")
    }
    baseline = _read(folder / "acceptability" / "baseline.json")
    acceptability = {
        "pretrained": [one["accuracy"] for one in found["pretrained"]],
        "random_init": [one["accuracy"] for one in found["random"]],
        **baseline,
    }
    tasks = {
        "acceptability": acceptability,
        **{name: _read(folder / f"{name}.json") for name in ("cloze", "sentiment")},
    }
    recipe = found["pretrained"][0]["recipe"]
    spans = read_spans(folder / "begun.txt")
    stage_seconds = {stage: covered(found) for stage, found in spans.items()}
    # An interrupted attempt has left no span, but what it did is in the run's figures.
    resumed = max(0.0, run.training[-1]["consumed_tokens"] / run.tokens_per_second() - stage_seconds["pretraining"])
    stage_seconds["pretraining"] += resumed
    return {
        **{name: evaluation[name] for name in INTRINSIC},
        "tasks": tasks,
        # Of the task that is fine-tuned.
        "pretrained_accuracy": acceptability["pretrained"],
        "random_init_accuracy": acceptability["random_init"],
        "tfidf_accuracy": acceptability["tfidf"],
        "tokens_seen": int(run.training[-1]["consumed_tokens"]),
        "tokens_per_second": run.tokens_per_second(),
        "steps": int(run.training[-1]["step"]),
        "seconds": covered(span for found in spans.values() for span in found) + resumed,
        "stage_seconds": stage_seconds,
        "overlaps_removed": counts["overlaps"],
        "finetuning_epochs": recipe["epochs"],
        "finetuning_learning_rate": recipe["learning_rate"],
        "finetuning_batch_size": recipe["batch_size"],
        "verdicts": {name: verdict(task["pretrained"], task["random_init"]) for name, task in tasks.items()},
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
        return f"pretraining helped: every pretrained run is better than every one from random weights ({points})."
    if max(pretrained) < min(random):
        return (
            "at this budget pretraining does not help: every pretrained run is worse than every one from random "
            f"weights ({points})."
        )
    ranges = [f"{100 * min(values):.1f} to {100 * max(values):.1f}" for values in (pretrained, random)]
    return (
        f"at this budget pretraining does not help: over the seeds, pretrained weights reach {ranges[0]} and random "
        f"weights {ranges[1]}, which overlap ({points})."
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
    ]
    for name, task in s["tasks"].items():
        rows += [
            ("", "", "", ""),
            (f"{name}, accuracy", "median", "seeds", ""),
            _accuracies("from pretrained weights", task["pretrained"]),
            _accuracies("from random weights", task["random_init"]),
            (f"TF-IDF; always the same: {100 * task['chance']:.1f}", f"{100 * task['tfidf']:.1f}", "", ""),
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
            *(line for name, text in s["verdicts"].items() for line in _wrapped(f"{name.capitalize()}: {text}")),
            *_wrapped(about_tasks(s)),
            f"  {s['overlaps_removed']} sentences that share six words in a row with a review were removed first.",
            f"  Pretraining: {s['steps']:,} steps, {s['tokens_seen'] / 1e6:.2f} M tokens, "
            f"{s['tokens_per_second']:,.0f} tokens/s. All stages together: {minutes:.1f} minutes.",
        ]
    )


def about_tasks(summary: dict[str, Any]) -> str:
    """How the tasks were asked."""
    acceptability, cloze, sentiment = (summary["tasks"][name] for name in ("acceptability", "cloze", "sentiment"))
    return (
        "Acceptability asks whether four neighbouring words of a held-out sentence were shuffled, which is near to "
        f"what is pretrained; fine-tuned on {acceptability['num_train']:,} sentences "
        f"({summary['finetuning_epochs']} epochs, "
        f"batches of {summary['finetuning_batch_size']}, rate {summary['finetuning_learning_rate']:g}), tested on "
        f"{acceptability['num_test']:,}. Cloze asks which of four words, about equally frequent, stood in a gap of a "
        "held-out sentence: the one that main's detection head finds most original, as it was pretrained; "
        f"{cloze['num_test']:,} gaps, a third for each seed. Sentiment is asked of frozen features: linear classifiers "
        f"of {sentiment['num_train']:,} labelled sentences, tested on {sentiment['num_test']:,}."
    )


def next_steps(folder: Path) -> str:
    """What to look at and to run after the demonstration."""
    lines = [
        "",
        f"made {folder}/demo.html (open it in a browser), {folder}/summary.json and the model {folder}/model",
        "next:",
        f"  tensorboard --logdir {folder}/pretraining/tensorboard",
        f"  python tools/finetune.py --model {folder}/model --task classification --train_file TRAIN.csv "
        "--validation_file VALIDATION.csv --output DIR",
    ]
    lines.append("  make demo MINUTES=60    the same with more to read")
    lines.append("  make learn    METRO beside ELECTRA and masked language models at equal FLOPs")
    return "\n".join(lines)


def _row(name: str, value: float, trivial: float, note: str = "") -> tuple[str, str, str, str]:
    return name, f"{value:.3f}", f"{trivial:.3f}", note


def _goal(is_reached: bool, what: str) -> str:
    return f"{what}: {'goal reached' if is_reached else 'goal MISSED'}"


def _accuracies(name: str, values: Sequence[float]) -> tuple[str, str, str, str]:
    return name, f"{100 * median(values):.1f}", " ".join(f"{100 * value:.1f}" for value in values), ""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_tool(main)
