"""The campaign's table in short: what each arm's seeds have, at its chosen rate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from metro_megatron.cli.command_line import run_tool
from metro_megatron.errors import UserError
from metro_megatron.evaluate.comparison import summary
from tools.campaign.rows import TASKS, read_baselines, read_rows

SHOWN = ("aux_loss", "clm_loss", "mlm_loss", "rtd_loss", "rtd_auc", *TASKS)


@dataclass(frozen=True)
class Options:
    """Of which table."""

    results: str = "docs/results/campaign.csv"
    """Table of make learn."""


def main(options: Options) -> None:
    """Print median, spread and standard error of every figure, by arm, learning rate, budget and steps.

    Groups of one seed are tries of a rate. Whether two arms differ says tools/compare_runs.py. Below them, what the
    tasks are worth without an encoder.
    """
    results = Path(options.results)
    rows = read_rows(results)
    if not rows:
        raise UserError(f"{options.results} has no rows; make learn writes it")
    print(
        "| arm | rate | FLOPs | seeds | figure | median | spread | standard error |\n|---|---|---|---|---|---|---|---|"
    )
    print(*lines(rows), sep="\n")
    for task, baselines in read_baselines(results).items():
        for name, value in baselines.items():
            print(f"| {name} |  |  |  | {task} | {value:.4f} |  |  |")


def lines(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A line for each group of runs and figure that it has."""

    def key(row: Mapping[str, str]) -> tuple[str, str, str, str]:
        # Runs of one batch and budget have one number of steps.
        return row["arm"], row["lr"], f"{float(row['flops']):.2g}", row["steps"]

    for (arm, rate, flops, _), group in groupby(sorted(rows, key=key), key):
        runs = list(group)
        for figure in SHOWN:
            values = [float(run[figure]) for run in runs if run[figure]]
            if values:
                median, spread, error = summary(values)
                last = "" if math.isnan(error) else f"{error:.4f}"
                yield f"| {arm} | {rate} | {flops} | {len(values)} | {figure} | {median:.4f} | {spread:.4f} | {last} |"


if __name__ == "__main__":
    run_tool(main)
