"""The campaign's table: one row for each finished run, docs/campaign.md says what its columns mean."""

import csv
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.files import replace_text
from metro_megatron.tasks.recipes import RECIPES

FIGURES = (
    "aux_loss",
    "aux_accuracy",
    "clm_loss",
    "clm_accuracy",
    "mlm_loss",
    "mlm_accuracy",
    "unigram_loss",
    "unigram_accuracy",
    "rtd_loss",
    "rtd_trivial_loss",
    "rtd_auc",
    "replace_rate",
    "replace_accuracy",
    "non_replace_accuracy",
)
"""Of tools/evaluate.py; an arm has those of its heads."""
TASKS = tuple(recipe.name for recipe in RECIPES)
"""Of tools/probe.py, which all arms have."""
FINETUNED = "finetuned."
"""Before the name of a task in scores of tools/campaign/finetuned.py, which have no column."""
COLUMNS = (
    *("run", "arm", "seed", "lr", "steps", "tokens", "flops", "validation", *FIGURES, *TASKS),
    *("seconds", "device", "versions", "commit", "date"),
)
CONFIG = "run_config.yaml"
"""Of a run's kept scores: says its seed."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows in order; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def put_row(path: Path, row: Mapping[str, object]) -> None:
    """Put a row where the same run's stands, or else at the end; the file is the old one or the new one at any time.

    A run that is done again keeps its `validation`: later seeds were trained at the rate that it chose, which another
    layout's rounding must not undo.
    """
    rows: dict[object, Mapping[str, object]] = {one["run"]: one for one in read_rows(path)}
    before = rows.get(row["run"], row)
    rows[row["run"]] = {**row, "validation": before.get("validation", "")}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def tasks_beside(results: Path) -> Path:
    """The file beside the table that says what the tasks of its rows are, and what counting words is worth on them."""
    return results.with_name(f"{results.stem}_tasks.json")


def scores_beside(results: Path) -> Path:
    """The folder beside the table with the scores of its rows' runs, as runs stay on their machine."""
    return results.with_name(f"{results.stem}_scores")


def keep_scores(run: Path, seed: int, results: Path) -> None:
    """Copy the scores of a run beside the table, compressed, as tools/compare_runs.py reads a run."""
    kept = scores_beside(results) / run.name
    for file in sorted((run / "scores").rglob("*.jsonl")):
        copy = kept / f"{file.relative_to(run)}.gz"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    # The last one: where it is, all are.
    (kept / CONFIG).write_text(f"train: {{seed: {seed}}}\n", encoding="utf-8")


def has_scores(run: str, results: Path) -> bool:
    """Whether keep_scores has kept those of a run."""
    kept = scores_beside(results) / run
    return (kept / CONFIG).is_file() and any(kept.rglob("*.jsonl.gz"))


def keep_tasks(manifest: Path, results: Path) -> None:
    """Lay the tasks' manifest beside the table. Raises UserError where its rows are of other tasks."""
    kept = tasks_beside(results)
    if kept.exists() and read_rows(results) and _rows_of(kept) != _rows_of(manifest):
        raise UserError(f"{results} has rows of other tasks than {manifest.parent}; give another --results")
    results.parent.mkdir(parents=True, exist_ok=True)
    replace_text(kept, manifest.read_text(encoding="utf-8"))


def read_baselines(results: Path) -> dict[str, dict[str, float]]:
    """What each task's metric is without an encoder, by task and baseline."""
    tasks = _read(tasks_beside(results))["tasks"]
    return {name: facts["baselines"] for name, facts in tasks.items()}


def _rows_of(manifest: Path) -> dict[str, Any]:
    return {name: facts["sha256"] for name, facts in _read(manifest)["tasks"].items()}


def _read(manifest: Path) -> Any:
    return json.loads(manifest.read_text(encoding="utf-8"))
