"""The campaign's table in short: what each arm's seeds have, at its chosen rate."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from metro_megatron.cli.command_line import run_printing_tool
from metro_megatron.errors import UserError
from metro_megatron.evaluate.comparison import summary
from tools.campaign.arms import ARMS, badness
from tools.campaign.rows import TASKS, has_scores, read_baselines, read_rows, scores_beside, tasks_beside

Row = Mapping[str, str]
SHOWN = ("aux_loss", "clm_loss", "mlm_loss", "rtd_loss", "rtd_auc", *TASKS)
COMPARED = "metro"
"""The arm that all others are compared with."""
SAME_BUDGET = 0.04
"""By how much the FLOPs of two arms may differ, each of which is within 2% of the budget."""


@dataclass(frozen=True)
class Options:
    """Of which table."""

    results: str = "docs/results/campaign.csv"
    """Table of make learn."""


def main(options: Options) -> None:
    """Print median, spread and standard error of every figure, by arm, learning rate, budget and steps.

    Groups of one seed are tries of a rate. Below them, what the tasks are worth without an encoder, and the commands
    that say whether METRO differs from the other arms.
    """
    results = Path(options.results)
    rows = read_rows(results)
    if not rows:
        raise UserError(f"{options.results} has no rows; make learn writes it")
    print(
        "| arm | rate | FLOPs | seeds | figure | median | spread | standard error |\n|---|---|---|---|---|---|---|---|"
    )
    print(*lines(rows), sep="\n")
    if tasks_beside(results).exists():
        for task, baselines in read_baselines(results).items():
            for name, value in baselines.items():
                print(f"| {name} |  |  |  | {task} | {value:.4f} |  |  |")
    if scores_beside(results).is_dir():
        for line in comparisons(rows, results):
            print(line)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each group of runs and figure that it has."""
    for (arm, flops, _, rate), runs in groups(rows).items():
        for figure in SHOWN:
            values = [float(run[figure]) for run in runs if run.get(figure)]
            if values:
                median, spread, error = summary(values)
                others = "  |  |" if len(values) == 1 else f" {spread:.4f} | {error:.4f} |"
                yield f"| {arm} | {rate} | {flops} | {len(values)} | {figure} | {median:.4f} |{others}"


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Runs that differ in their seed alone, by arm, FLOPs, steps and rate."""

    def key(row: Row) -> tuple[str, str, str, str]:
        # Runs of one batch and budget have one number of steps.
        return row["arm"], f"{float(row['flops']):.2g}", row["steps"], row["lr"]

    return {own: list(group) for own, group in groupby(sorted(rows, key=key), key)}


def comparisons(rows: Sequence[Row], results: Path) -> Iterator[str]:
    """By budget and arm, the command that compares METRO with it at their chosen rates, of the runs whose scores are
    there; or what it lacks. Both arms must have such a run of one seed.
    """
    arm = COMPARED
    budgets = {own[1]: float(runs[0]["flops"]) for own, runs in groups(rows).items() if own[0] == arm}
    for name, flops in budgets.items():
        for other in (one.name for one in ARMS if one.name != arm):
            ours, theirs = chosen(rows, arm, flops), chosen(rows, other, flops)
            if not theirs:
                continue
            a, b = (
                {run["seed"]: run["run"] for run in runs if has_scores(run["run"], results)} for runs in (ours, theirs)
            )
            if a.keys() & b.keys():
                folders = [[f"{scores_beside(results)}/{run}" for run in one.values()] for one in (a, b)]
                yield shlex.join(["python", "tools/compare_runs.py", "--a", *folders[0], "--b", *folders[1]])
            else:
                yield f"{arm} and {other} at {name} FLOPs: no seed has scores of both yet; make learn adds them"


def chosen(rows: Sequence[Row], arm: str, flops: float) -> list[Row]:
    """An arm's runs at its chosen rate, that of its later seeds: where there are none, that of its best try. Runs that
    are not trained are of every budget."""
    budgets = flops, 0.0
    own = [
        row
        for row in rows
        if row["arm"] == arm and any(math.isclose(float(row["flops"]), one, rel_tol=SAME_BUDGET) for one in budgets)
    ]
    tries = list(groups(own).values())
    later = [runs for runs in tries if any(int(run["seed"]) > 1 for run in runs)]
    return min(later or tries, key=lambda runs: (-len(runs), badness(runs[0])), default=[])


if __name__ == "__main__":
    run_printing_tool(main)
