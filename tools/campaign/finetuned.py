"""The campaign's models fine-tuned on the tasks with classes, beside what their frozen features are worth."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from metro_megatron.cli.command_line import run_tool
from metro_megatron.cli.options import at_least
from metro_megatron.errors import UserError
from metro_megatron.files import locked, replace_text
from metro_megatron.tasks.recipes import RECIPES
from tools.campaign.campaign import check_arms, check_rates
from tools.campaign.commands import Call, Commands
from tools.campaign.rows import FINETUNED, keep_scores, read_rows
from tools.campaign.summary import COMPARED, chosen

CLASSES = tuple(recipe.name for recipe in RECIPES if recipe.kind in ("classification", "pairs"))
DEVELOPMENT = 4
"""Of the rows to learn from the last fourth chooses the rate, and the rest are learned for that."""


@dataclass(frozen=True)
class Options:
    """What to fine-tune, and how."""

    arms: list[str] = field(default_factory=lambda: ["metro", "electra", "mlm_15"])
    """Arms whose runs at the chosen rate of pretraining are fine-tuned; of several budgets those of the largest."""
    tasks: list[str] = field(default_factory=lambda: list(CLASSES))
    """Tasks to learn, of those that have classes."""
    rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])
    """Peak learning rates of fine-tuning, the same for each arm: seed 1 tries all on a fourth of the rows to learn
    from, and each arm's best one on a task is that of all its seeds there."""
    epochs: Annotated[int, at_least(1)] = 5
    """Passes over the rows."""
    root: str = "runs/campaign"
    """Folder of make learn, with tasks/ and the runs' models."""
    results: str = "docs/results/campaign.csv"
    """Table of make learn; scores go into the folder beside it."""


def main(options: Options) -> None:
    """Fine-tune main of every run on every task; what is done is skipped.

    A row of a task's test scores 1 where its class is found: tools/compare_runs.py compares such scores, of tasks
    called finetuned.NAME.
    """
    check_arms(options.arms)
    check_rates(options.rates)
    if unknown := [task for task in options.tasks if task not in CLASSES]:
        raise UserError(f"--tasks {unknown[0]}: has no classes to learn; there are {', '.join(CLASSES)}")
    runs = {arm: runs_of(arm, options) for arm in options.arms}
    call = Commands()
    for arm, own in runs.items():
        try:
            with locked(Path(options.root) / f"finetuned_{arm}.lock", wait=False):
                finetune_arm(arm, own, options, call)
        except BlockingIOError as error:
            raise UserError(f"{arm}: another process fine-tunes its runs; wait for it or end it") from error
    print("next: python -m tools.campaign.summary, whose commands compare these scores, too")


def runs_of(arm: str, options: Options) -> dict[int, str]:
    """Names by seed. Raises UserError where a run's model is not on this machine."""
    rows = read_rows(Path(options.results))
    budgets = [float(row["flops"]) for row in rows if row["arm"] == COMPARED]
    if not budgets:
        raise UserError(f"{options.results} has no runs of {COMPARED}; make learn adds them")
    found = {int(row["seed"]): row["run"] for row in chosen(rows, arm, max(budgets))}
    models = [Path(options.root) / run / "model" for run in found.values()]
    if lacking := [str(model) for model in models if not (model / "config.json").is_file()]:
        raise UserError(f"--arms {arm}: {lacking[0]} is not here; make learn exports it")
    if 1 not in found:
        raise UserError(
            f"--arms {arm}: {options.results} has no run of seed 1, which chooses rates; make learn adds it"
        )
    return found


def finetune_arm(arm: str, runs: Mapping[int, str], options: Options, call: Call) -> None:
    """Every task with every seed; a task's scores are kept when it is done."""
    for task in options.tasks:
        rate = rate_of(runs[1], task, options, call)
        for seed, run in runs.items():
            rows = Path(options.root) / "tasks" / task
            done = finetune(run, rows / "train.jsonl", rows / "test.jsonl", f"{task}-{rate:g}", rate, options, call)
            print(f"{arm}, seed {seed}, {task} at {rate:g}: accuracy {accuracy(done):.4f}", flush=True)
            scores = Path(options.root) / run / "scores" / "finetuned" / f"{task}.jsonl"
            scores.parent.mkdir(parents=True, exist_ok=True)
            replace_text(scores, "".join(score_lines(done / "predictions.jsonl", f"{FINETUNED}{task}")))
            keep_scores(Path(options.root) / run, seed, Path(options.results))


def rate_of(run: str, task: str, options: Options, call: Call) -> float:
    """The rate of the best accuracy on rows that were held out of those to learn from; the first of equal ones."""
    if len(options.rates) == 1:
        return options.rates[0]
    lines = (Path(options.root) / "tasks" / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    # Neighbours may be versions of one sentence: they stay on one side.
    first = len(lines) - len(lines) // DEVELOPMENT
    folder = Path(options.root) / run / "finetuned"
    folder.mkdir(exist_ok=True)
    learned, held_out = (folder / f"{task}-{part}.jsonl" for part in ("learned", "held_out"))
    replace_text(learned, "".join(lines[:first]))
    replace_text(held_out, "".join(lines[first:]))

    def tried(rate: float) -> float:
        return accuracy(finetune(run, learned, held_out, f"{task}-{rate:g}-tried", rate, options, call))

    return max(options.rates, key=tried)


def finetune(run: str, train: Path, validation: Path, name: str, rate: float, options: Options, call: Call) -> Path:
    """The folder of a fine-tuned model, of which the weights are thrown away."""
    folder = Path(options.root) / run / "finetuned" / f"{name}-{options.epochs}"
    if not (folder / "metrics.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = {
            "model": Path(options.root) / run / "model",
            "task": "classification",
            "train_file": train,
            "validation_file": validation,
            "learning_rate": rate,
            "epochs": options.epochs,
            "warmup_steps": 16,
            "batching": "packed",
            "output": folder,
        }
        given = [str(word) for option, value in words.items() for word in (f"--{option}", value)]
        call([sys.executable, "tools/finetune.py", *given], folder.parent / "output.txt")
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    return folder


def accuracy(folder: Path) -> float:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["accuracy"])


def score_lines(predictions: Path, task: str) -> Iterator[str]:
    """As tools/compare_runs.py reads them: 1 where the class was found."""
    for line in predictions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        score = {"task": task, "id": row["id"], "score": float(row["prediction"] == row["label"])}
        yield json.dumps(score) + "\n"


if __name__ == "__main__":
    run_tool(main)
