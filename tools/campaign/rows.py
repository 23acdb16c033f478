"""The campaign's table: one row for each finished run, docs/campaign.md says what its columns mean."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.files import replace_text

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
COLUMNS = (
    *("run", "arm", "seed", "lr", "steps", "tokens", "flops", *FIGURES),
    *("seconds", "device", "versions", "commit", "date"),
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows in order; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row; the file is the old one or the new one at any time. Raises UserError if it has this run's row."""
    rows: list[Mapping[str, object]] = [*read_rows(path)]
    if any(one["run"] == row["run"] for one in rows):
        raise UserError(f"{path} has a row of {row['run']} already; remove that one if it is wrong")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())
