"""The campaign's table in short: what each arm's seeds have, at its chosen rate."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from metro_megatron.cli.command_line import run_printing_tool
from metro_megatron.cli.picture import refuse_picture
from metro_megatron.commands.compare_runs import Compared, compare, read_arm
from metro_megatron.errors import UserError
from metro_megatron.evaluate.comparison import summary
from tools.campaign.arms import ARMS, badness
from tools.campaign.picture import draw
from tools.campaign.rows import TASKS, has_scores, read_baselines, read_rows, scores_beside, tasks_beside

Row = Mapping[str, str]
SHOWN = ("aux_loss", "clm_loss", "mlm_loss", "rtd_loss", "rtd_auc", *TASKS)
COMPARED = "metro"
"""The arm that all others are compared with."""
TITLES = {arm.name: arm.title for arm in ARMS}
SAME_BUDGET = 0.04
"""By how much the FLOPs of two arms may differ, each of which is within 2% of the budget."""


@dataclass(frozen=True)
class Options:
    """Of which table."""

    results: str = "docs/results/campaign.csv"
    """Table of make learn."""
    picture: str = ""
    """File of a picture of METRO's differences from the other arms in tasks, such as campaign.png; none by default."""


def main(options: Options) -> None:
    """Print median, spread and standard error of every figure, by arm, learning rate, budget and steps.

    Groups of one seed are tries of a rate. Below them, what the tasks are worth without an encoder, and the commands
    that say whether METRO differs from the other arms.
    """
    results = Path(options.results)
    if options.picture:
        refuse_picture(Path(options.picture))
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
    found = list(comparisons(rows, results)) if scores_beside(results).is_dir() else []
    for one in found:
        print(one)
    if options.picture:
        drawn = {one.title: [task for task in one.compare() if task.task in TASKS] for one in found if one.ours}
        if not drawn:
            raise UserError("--picture: no seed has scores of two arms beside the table; make learn adds them")
        draw(TITLES[COMPARED], drawn, Path(options.picture))
        print(f"made {options.picture}")


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


@dataclass(frozen=True)
class Comparison:
    """METRO and another arm at their chosen rates."""

    arm: str
    flops: str
    ours: Sequence[str]
    """Folders of METRO's runs whose scores are there; empty where no seed has scores of both."""
    theirs: Sequence[str]

    @property
    def title(self) -> str:
        return f"{TITLES[self.arm]}, {self.flops} FLOPs"

    def compare(self) -> Iterator[Compared]:
        """As tools/compare_runs.py does."""
        return compare(read_arm(self.ours), read_arm(self.theirs))

    def __str__(self) -> str:
        """The command, or what it lacks."""
        if not self.ours:
            lacks = "no seed has scores of both yet; make learn adds them"
            return f"{COMPARED} and {self.arm} at {self.flops} FLOPs: {lacks}"
        return shlex.join(["python", "tools/compare_runs.py", "--a", *self.ours, "--b", *self.theirs])


def comparisons(rows: Sequence[Row], results: Path) -> Iterator[Comparison]:
    """By budget and arm."""
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
            both = (a, b) if a.keys() & b.keys() else ({}, {})
            folders = [[f"{scores_beside(results)}/{run}" for run in one.values()] for one in both]
            yield Comparison(other, name, *folders)


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
