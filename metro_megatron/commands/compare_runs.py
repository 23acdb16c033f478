"""Say whether runs of one arm score higher than those of another, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from metro_megatron.cli.command_line import run_printing_tool
from metro_megatron.cli.options import parse_value
from metro_megatron.errors import UserError
from metro_megatron.evaluate.comparison import (
    CONFIDENCE,
    MOST_SEEDS,
    POWER,
    Difference,
    difference,
    more_seeds,
    variance_ratio,
)
from metro_megatron.evaluate.scores import read_scores

Arm = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Scores by seed, task and item."""


@dataclass(frozen=True)
class Options:
    """Which runs."""

    a: list[str]
    """Folders of runs of one arm, a seed each: scores/ holds *.jsonl or *.jsonl.gz, in folders or not; run_config.yaml
    is there, too, or in pretraining/."""
    b: list[str]
    """Those of the other arm. Seeds that both have are paired; if there are none, the arms are compared unpaired."""


@dataclass(frozen=True)
class Compared:
    """A task's difference, and how it was found."""

    task: str
    found: Difference | float
    """A number alone where there is one seed, which has no interval."""
    num_items: int
    num_left_out: int
    """Items that not every run has a score for."""
    ratio: float
    """variance_ratio; NaN where seeds are not paired."""

    def __str__(self) -> str:
        left_out = f", {self.num_left_out:,} left out" if self.num_left_out else ""
        items = f"{self.task:<28} {self.num_items:>6,} items{left_out}"
        if isinstance(self.found, float):
            return f"{items}: {self.found:+.5f}; one seed has no interval"
        low, high = self.found.mean - self.found.half_width, self.found.mean + self.found.half_width
        line = f"{items}: {self.found.mean:+.5f}, {100 * CONFIDENCE:g}% interval {low:+.5f} to {high:+.5f}; "
        line += _verdict(self.found)
        return line + ("" if math.isnan(self.ratio) else f"; variance paired / unpaired {self.ratio:.2f}")


def main(options: Options) -> None:
    """Compare two arms on every task that both have scores of: mean of A minus mean of B, with an interval.

    Seeds are what is repeated; runs of one seed share order, masks, noise and initial weights and are compared pair by
    pair. The interval is for other seeds and other items of the same kind. Every task's interval stands alone: of
    twenty tasks without a difference, one is expected to look as if it had one. Scores are written by
    tools/evaluate.py --documents FILE, and by any other tool, a line for an item: {"task", "id", "score"}.
    """
    a, b = read_arm(options.a), read_arm(options.b)
    seeds = sorted(a.keys() & b.keys())
    if seeds:
        lacked = {"A": b.keys() - a.keys(), "B": a.keys() - b.keys()}
        lacks = [f"{arm} lacks {_list(missing)}" for arm, missing in lacked.items() if missing]
        print(f"A - B, paired by seeds {'; '.join([_list(seeds), *lacks])}")
        if len(seeds) == 1 and lacks:
            print(f"one pair has no interval: {_remedy(a, b, seeds[0])}")
    else:
        print(f"A - B, unpaired: {len(a)} seeds against {len(b)} others")
    for one in compare(a, b):
        print(one)


def read_arm(folders: Sequence[str]) -> Arm:
    """Scores of runs by their seed. Raises UserError for a folder without scores or seed, and for a seed twice."""
    arm: dict[int, dict[str, dict[str, float]]] = {}
    for folder in map(Path, folders):
        files = sorted(file for ending in ("jsonl", "jsonl.gz") for file in (folder / "scores").rglob(f"*.{ending}"))
        if not files:
            raise UserError(f"{folder} has no *.jsonl in scores/; write one with tools/evaluate.py --documents")
        seed = _seed(folder)
        if seed in arm:
            raise UserError(f"{folder} is a second run of seed {seed} in its arm; give each seed once")
        arm[seed] = {}
        for file in files:
            for task, items in read_scores(file).items():
                if task in arm[seed]:
                    raise UserError(f"{file}: {folder} has scores of {task} in two files; remove one")
                arm[seed][task] = items
    return arm


def compare(a: Arm, b: Arm) -> Iterator[Compared]:
    """Every task that all runs have. Raises UserError where there is none, or one without common items."""
    seeds = sorted(a.keys() & b.keys())
    if seeds:
        a, b = {seed: a[seed] for seed in seeds}, {seed: b[seed] for seed in seeds}
    runs = [*a.values(), *b.values()]
    tasks = [task for task in runs[0] if all(task in run for run in runs)]
    if not tasks:
        raise UserError("--a and --b have no task that all runs have scores of; score them on the same tasks")
    for task in tasks:
        items = [one for one in runs[0][task] if all(one in run[task] for run in runs)]
        if len(items) < 2:
            raise UserError(f"{task}: the runs have {len(items)} items in common; score them on the same texts")
        of_a, of_b = (_table(arm, task, items) for arm in (a, b))
        num_left_out = len({one for run in runs for one in run[task]}) - len(items)
        found, ratio = _difference(of_a, of_b, is_paired=bool(seeds))
        yield Compared(task, found, len(items), num_left_out, ratio)


def _difference(a: NDArray[np.float64], b: NDArray[np.float64], is_paired: bool) -> tuple[Difference | float, float]:
    if min(len(a), len(b)) < 2:
        return float(a.mean() - b.mean()) if not is_paired else float((a - b).mean()), math.nan
    if is_paired:
        return difference(a - b), variance_ratio(a, b)
    return difference(a, -b), math.nan


def _table(arm: Arm, task: str, items: Sequence[str]) -> NDArray[np.float64]:
    """[n, m] by seed and item."""
    return np.array([[arm[seed][task][one] for one in items] for seed in sorted(arm)])


def _list(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _remedy(a: Arm, b: Arm, seed: int) -> str:
    """For arms of which some seeds could be paired, if the other had them."""
    more = [
        f"seed {_list(of - own)} of {arm}"
        for arm, own, of in (("A", a.keys(), b.keys()), ("B", b.keys(), a.keys()))
        if of - own
    ]
    apart = [arm for arm, own in (("--a", a), ("--b", b)) if len(own) > 2 and min(len(a), len(b)) > 1]
    return f"run {' or '.join(more)} as well" + (f", or leave {seed} out of {apart[0]}: unpaired" if apart else "")


def _seed(folder: Path) -> int:
    """Of a file that need not have all options, or none but these."""
    for path in (folder / "run_config.yaml", folder / "pretraining" / "run_config.yaml"):
        if path.exists():
            try:
                return int(parse_value(yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["seed"], int))
            except (yaml.YAMLError, ValueError, LookupError, TypeError, UserError) as error:
                raise UserError(
                    f"{path}: has no readable train.seed ({' '.join(str(error).split())}); write train: {{seed: N}}"
                ) from error
    raise UserError(f"{folder} has no run_config.yaml, nor has its pretraining/; give the folder of a run")


def _verdict(found: Difference) -> str:
    if found.variance == 0:
        return "no difference in any score" if found.mean == 0 else "the same difference in every score"
    if found.is_verdict:
        return f"{'A' if found.mean > 0 else 'B'} is higher"
    more = more_seeds(found)
    if more is None:
        return f"no verdict, nor with {MOST_SEEDS:,} seeds if this is the difference: more items would be needed"
    return f"no verdict; {more} more seeds would have one in {100 * POWER:g}% of cases if this is the difference"


run = partial(run_printing_tool, main)
"""The console script."""
